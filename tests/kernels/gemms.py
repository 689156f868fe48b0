"""Counting the matrix products of a call."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class CountGemms(TorchDispatchMode):
    """Multiply-adds of all products."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__.rstrip("_") in ("mm", "addmm"):
            left, right = [one for one in arguments if isinstance(one, torch.Tensor) and one.dim() == 2][-2:]
            self.total += left.shape[0] * left.shape[1] * right.shape[1]
        return function(*arguments, **(options or {}))
