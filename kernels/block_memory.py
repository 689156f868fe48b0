"""Room for the (B, V) temporaries of one block of rows after another."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class BlockMemory:
    """Room for the temporaries of a piece, which the next pieces of the same worker use again.

    To take and free it for every piece would leave holes in the heap of the worker's thread: an aligned chunk that was freed
    is, before glibc 2.38, some bytes short of the next one like it, and temporaries of 2 MiB had made heaps of 125 MiB.
    """

    def __init__(self, *, keeps: bool):
        """Without `keeps`, for whoever is no worker: nothing is kept, and `out=like(...)` allocates as it does without."""
        self.keeps, self._buffers, self._taken = keeps, [], 0

    def like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """Another tensor of this shape, with anything in it, until the piece ends, or the part of it that is `passing`."""
        if not self.keeps:
            return None
        dtype = dtype or tensor.dtype
        size = tensor.numel() * dtype.itemsize
        if self._taken == len(self._buffers):
            self._buffers.append(None)
        if self._buffers[self._taken] is None or len(self._buffers[self._taken]) < size:
            self._buffers[self._taken] = None  # before the larger one is there
            with torch.inference_mode(False):  # or it could not be written outside of that mode
                self._buffers[self._taken] = torch.empty(size, dtype=torch.uint8, device=tensor.device)
        self._taken += 1
        return self._buffers[self._taken - 1][:size].view(dtype).view(tensor.shape)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A part of a piece: what it takes is free again after it."""
        taken = self._taken
        try:
            yield
        finally:
            self._taken = taken


FRESH = BlockMemory(keeps=False)
