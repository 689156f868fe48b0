"""Hidden states whose logits are standardised row by row, without full logits.

    q = softmax(z / s),    s^2 = sum_i (z_i - mean z)^2 / (V - 1)

A softmax does not see that the mean is taken away, so that standardising is a temperature for every row. With logits
z = W h, and W' the head less the mean of its rows, z - mean z = W' h: the squares add up to h^T (W'^T W') h, and the standard
deviation of a row follows from an (H, H) product of the centred head with itself. Without centring, what all logits of a row
have in common would be squared and taken away again, and fp32 would lose a deviation that is small beside it.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minillm import UserError
from minillm.losses import LMHead

TINY = 1e-7  # beside the standard deviation, as released
CHUNK = 8192  # rows of a head in fp32 at a time


def standardized(hidden: Tensor, head: LMHead, vocab_size: int) -> Tensor:  # (N, H) -> (N, H)
    """Hidden states whose logits are the standardised ones, but for their mean. Raises UserError as `deviations` does."""
    return (hidden / (deviations(hidden, head, vocab_size) + TINY)[:, None]).to(hidden)


def sums_of_standardized(
    hidden: Tensor,  # (N, H)
    head: LMHead,
    vocab_size: int,
    sums: Callable[[Tensor, LMHead], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """`sums` of standardised hidden states and their head: a scalar with a gradient, also through the deviations, and one
    without. Its gradients are taken in the forward pass: a sharded head is not there later."""
    return _InForwardPass.apply(hidden, head.weight, head, vocab_size, sums)


class _InForwardPass(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, head: LMHead, vocab_size: int, sums: Callable
    ) -> tuple[Tensor, Tensor]:
        states, matrix = hidden.detach().requires_grad_(), weight.detach().requires_grad_(weight.requires_grad)
        own = LMHead(matrix, head.bias, head.logit_scale, head.softcap)
        with torch.enable_grad():
            total, of_answers = sums(standardized(states, own, vocab_size), own)
        inputs = [one for one in (states, matrix) if one.requires_grad]
        with torch.autocast(hidden.device.type, enabled=False):  # products of fp32 stay in fp32
            gradients = torch.autograd.grad(total, inputs)
        ctx.save_for_backward(gradients[0], gradients[1] if len(gradients) > 1 else None)
        ctx.mark_non_differentiable(of_answers)
        return total.detach(), of_answers

    @staticmethod
    def backward(ctx, of_total, _):
        of_hidden, of_weight = ctx.saved_tensors
        weight = None if of_weight is None else of_total.to(of_weight) * of_weight
        return of_total.to(of_hidden) * of_hidden, weight, None, None, None


def deviations(hidden: Tensor, head: LMHead, vocab_size: int) -> Tensor:  # (N, H) -> (N,) fp32, or as hidden in float64
    """The standard deviation of every row's logits, with V - 1 in its divisor. Raises UserError as the divergence does."""
    weight, bias = head.weight[:vocab_size], None if head.bias is None else head.bias[:vocab_size]
    counted = None if bias is None else bias.isfinite()
    if head.softcap is not None or counted is not None and bias.masked_fill(~counted, 0.0).any():
        raise UserError(
            "method.standardize: logits are standardised of heads without softcap and bias; set it to false"
        )
    count = len(weight) if counted is None else counted.sum()
    with torch.autocast(hidden.device.type, enabled=False):
        total, squares = _CentredMoments.apply(weight, counted)  # (H,), (H, H)
        states = hidden.to(total.dtype)
        mean = states @ total / count  # what the rounding of the centre left
        variance = (((states @ squares) * states).sum(-1) - count * mean.square()) / (count - 1)
    return head.logit_scale * variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()


class _CentredMoments(torch.autograd.Function):
    """The sum of a matrix's rows W' (V, H) and W'^T W', in fp32 a chunk of rows at a time. W' is the matrix less the mean of
    its rows as fp32 has it, beside which the sum is small and not zero. Rows that are not counted (V,) bool are zeros of it.

    The mean is a constant to the gradient: a variance that is made of both does not change with it.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        centre, total, squares = (
            weight.new_zeros(shape, dtype=dtype) for shape in (weight.shape[1:], weight.shape[1:], weight.shape[1:] * 2)
        )
        for part, kept in _parts(weight, counted):
            centre += _without(part.to(dtype), kept).sum(0)
        centre /= len(weight) if counted is None else counted.sum()
        for part, kept in _parts(weight, counted):
            part = _without(part.to(dtype) - centre, kept)
            total += part.sum(0)
            squares.addmm_(part.T, part)
        ctx.save_for_backward(weight, centre, counted)
        return total, squares

    @staticmethod
    def backward(ctx, of_total: Tensor, of_squares: Tensor) -> tuple[Tensor, None]:
        weight, centre, counted = ctx.saved_tensors
        both, result = of_squares + of_squares.T, torch.empty_like(weight)
        for (part, kept), into in zip(_parts(weight, counted), result.split(CHUNK), strict=True):
            into.copy_(_without(torch.addmm(of_total, part.to(both) - centre, both), kept))
        return result, None


def _parts(weight: Tensor, counted: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(rows, which of them count), a chunk at a time."""
    parts = weight.split(CHUNK)
    return zip(parts, [None] * len(parts) if counted is None else counted.split(CHUNK), strict=True)


def _without(rows: Tensor, kept: Tensor | None) -> Tensor:  # (C, H), (C,) bool -> (C, H)
    return rows if kept is None else rows.masked_fill(~kept[:, None], 0.0)
