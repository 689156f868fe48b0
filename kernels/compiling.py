"""Recorders of calls, which replace operations or remember them: torch.compile, torch.export, make_fx, FakeTensorMode, selective checkpointing.

Under any of them the door's functions are the operators of `traced`; what only counts or times operations, such as
FlopCounterMode, sees those of the eager functions.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

F = TypeVar("F", bound=Callable)

_RECORDERS = (
    "torch.fx.",
    "torch._subclasses.",
    "torch.utils.checkpoint",
    "torch._functorch.",
)  # modules of their modes


def is_recorded() -> bool:
    """True where the calls of this thread are recorded or replaced at the moment."""
    if torch.compiler.is_compiling():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(type(mode).__module__.startswith(_RECORDERS) for mode in _get_current_dispatch_mode_stack())


def outside_compiled_graphs(function: F, reason: str) -> F:
    """A graph break around `function`, with its reason; the compiler is imported only by those who use it."""

    @functools.wraps(function)
    def entry(*args, **kwargs):
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                msg=reason
            )  # for one who asked for a full graph: a disabled function's is not shown
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return entry
