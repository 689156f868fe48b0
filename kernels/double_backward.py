"""Gradients of the fused losses have no gradient of their own: asking for one raises instead of giving zeros."""

import torch
from torch import Tensor


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gradient: Tensor, anchor: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *grad_outputs):
        raise RuntimeError(
            "the fused losses of minillm have no double backward: their gradient cannot be differentiated again; "
            "use minillm.kernels.reference on full logits for that"
        )


def guard(*gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients, such that differentiating them (after create_graph=True) raises a RuntimeError."""
    if not torch.is_grad_enabled():
        return gradients
    return tuple(
        None
        if gradient is None
        else _NoSecondDerivative.apply(gradient, torch.zeros((), device=gradient.device, requires_grad=True))
        for gradient in gradients
    )
