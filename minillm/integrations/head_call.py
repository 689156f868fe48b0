"""A function in the place of a model's LM head, inside the model's own forward pass.

There the hidden states are what the head would have got, whatever the architecture does before it, and the head's
weight is gathered by whoever shards it: DeepSpeed and FSDP do so when its module is called. The call goes through the
wrappers of DistributedDataParallel and their kind, which see a forward pass like any other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The language model inside of DistributedDataParallel's, DeepSpeed's or torch.compile's wrapper."""
    while not hasattr(model, "get_output_embeddings"):
        inside = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inside, nn.Module):
            raise ValueError(
                f"{type(model).__name__} has no get_output_embeddings(), so that its LM head is not known; pass a language "
                "model of transformers, or call the functions of minillm.losses with hidden states and head of your own"
            )
        model = inside
    return model


class _StandIn:
    """The forward of a head in whose place a function is; between the graphs of torch.compile, which sees the same object
    in every forward pass and so compiles the model once."""

    def __init__(self) -> None:
        self.function: Callable[[Tensor], Tensor] | None = None

    def __call__(self, hidden: Tensor) -> Tensor:  # (..., H)
        if torch.compiler.is_compiling():
            return torch.compiler.disable(self._call)(hidden)
        return self._call(hidden)

    def _call(self, hidden: Tensor) -> Tensor:
        assert self.function is not None
        return self.function(hidden)


_STAND_INS: WeakKeyDictionary[nn.Module, _StandIn] = WeakKeyDictionary()


@contextmanager
def in_place_of_head(model: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, `model`'s head returns function(hidden states (..., H)) in the place of logits."""
    head = unwrapped(model).get_output_embeddings()  # type: ignore[operator]
    if head is None:
        raise ValueError(f"{type(unwrapped(model)).__name__} has no LM head; pass a model that answers in text")
    stand_in = _STAND_INS.setdefault(head, _StandIn())
    before = head.__dict__.get("forward")  # of accelerate's hooks, say
    stand_in.function, head.forward = function, stand_in
    try:
        yield
    finally:
        stand_in.function = None
        if before is None:
            del head.forward
        else:
            head.forward = before


class Placeholder(torch.autograd.Function):
    """Zeros (..., 1) for logits, with an edge to the loss that brings it no gradient: by it a wrapper that looks for
    the parameters behind its output, or waits for the output's backward pass, finds the loss."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, hidden: Tensor) -> Tensor:  # (), (..., H) -> (..., 1)
        ctx.like = loss.dtype
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].new_zeros((), dtype=ctx.like), None
