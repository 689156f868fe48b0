"""A decode step as a CUDA graph: the host launches one thing a token, whatever the number of kernels in it."""

from collections.abc import Callable

import torch

from minillm.rollout.supported import require_gpu


class CudaGraphs:
    """Called with a step, runs it once and captures it; returns the replay. All graphs share one pool of memory.

    What the step reads and writes beside its own intermediate results must stay where it is: weights that are updated
    in place do.
    """

    def __init__(self, device: torch.device):
        """Raises ValueError where the device has no CUDA graphs."""
        require_gpu(device)
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Raises ValueError for a step that waits for the device or copies from the host."""
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream()
            self.stream.wait_stream(before)
            with torch.cuda.stream(self.stream):
                step()  # libraries set themselves up in a first run; this one counts, a capture runs nothing
            before.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # other threads of this process may use the GPU meanwhile
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    step()
            except RuntimeError as error:
                raise ValueError(
                    f"rollout.cuda_graphs: a decode step of these models cannot be captured ({error}). Leave "
                    "rollout.cuda_graphs out for them"
                ) from error
        return graph.replay
