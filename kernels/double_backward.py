"""Gradients of the fused losses have no gradient of their own: asking for one raises instead of giving zeros."""

from collections.abc import Sequence

import torch
from torch import Tensor


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor, *inputs: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *grad_outputs):
        raise RuntimeError(
            "the fused losses of minillm have no double backward: their gradient cannot be differentiated again; "
            "use minillm.kernels.reference on full logits for that"
        )


def guard(gradients: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients, such that differentiating them (after create_graph=True) raises a RuntimeError.

    `inputs` are the tensors that they depend on: asking for the derivative by any of them must lead here.
    """
    if not torch.is_grad_enabled():
        return tuple(gradients)
    return tuple(None if gradient is None else _NoSecondDerivative.apply(gradient, *inputs) for gradient in gradients)
