"""A decode step as a CUDA graph: the host launches one thing a token, whatever the number of kernels in it."""

from collections.abc import Callable
from functools import cache

import torch

from minillm import UserError
from minillm.rollout.local.graph_preconditions import require_gpu


class CudaGraphs:
    """Called with a step, runs it once and captures it; returns the replay. All graphs share one pool of memory.

    What the step reads and writes beside its own intermediate results must stay where it is: weights that are updated
    in place do.
    """

    def __init__(self, device: torch.device):
        """Raises UserError where the device has no CUDA graphs."""
        require_gpu(device)
        self.device = device
        self.stream = _side_stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], None]) -> Callable[[], None]:
        """Raises UserError for a step that waits for the device or copies from the host."""
        with torch.cuda.device(self.device):
            before = torch.cuda.current_stream()
            self.stream.wait_stream(before)
            with torch.cuda.stream(self.stream):
                step()  # libraries set themselves up in a first run; this one counts, a capture runs nothing
            before.wait_stream(self.stream)
            graph = torch.cuda.CUDAGraph()
            try:
                # other threads of this process may use the GPU meanwhile
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    step()
            except RuntimeError as error:
                cause = error.__context__ or error  # ending a capture that has failed is an error of its own
                raise UserError(
                    f"rollout.cuda_graphs: a decode step of these models cannot be captured ({cause}). Leave "
                    "rollout.cuda_graphs out for them"
                ) from error
        return graph.replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the whole process: the workspace that cuBLAS has for each stream is never given back."""
    return torch.cuda.Stream(device)
