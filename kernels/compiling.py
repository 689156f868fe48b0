"""torch.compile of a surrounding model: the fused losses run as they are, between its graphs."""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable)


def outside_compiled_graphs(function: F) -> F:
    """A graph break around `function`; the compiler is imported only by those who use it."""

    @functools.wraps(function)
    def entry(*args, **kwargs):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return entry
