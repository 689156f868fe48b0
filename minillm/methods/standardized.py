"""The divergence of two models whose logits are standardised row by row, of LLAVADI's released code, without full logits.

    q = softmax(z / s),    s^2 = sum_i (z_i - mean z)^2 / (V - 1)

A softmax does not see that the mean is taken away, so that standardising is a temperature for every row. With logits
z = W h, and W' the head less the mean of its rows, z - mean z = W' h: the squares add up to h^T (W'^T W') h, and the standard
deviation of a row follows from an (H, H) product of the centred head with itself. Without centring, what all logits of a row
have in common would be squared and taken away again, and fp32 would lose a deviation that is small beside it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minillm import UserError
from minillm.losses import LMHead, TokenStats, linear_objective

TINY = 1e-7  # beside the standard deviation, as released
CHUNK = 8192  # rows of a head in fp32 at a time


def standardized_divergence(
    hidden: Tensor,  # (N, H_s)
    head: LMHead,
    teacher_hidden: Tensor,  # (N, H_t)
    teacher_head: LMHead,
    *,
    weights: Tensor,  # (N,)
    answers: Tensor,  # (N,) bool
    divergence: str,
    vocab_size: int,
    options: dict[str, float],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the rows' divergences, and that of the answers' rows for the records.

    Differentiable with respect to `hidden` and the weight of `head`, also through the deviations. Ids above `vocab_size`,
    and those that a head gives no probability, are not among a row's logits.
    Raises UserError for heads that do more to their logits than one factor.
    """
    with torch.no_grad():
        target = _scaled(teacher_hidden, teacher_head, vocab_size)

    def objective(stats: TokenStats, weights: Tensor, answers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # (C,) each
        distance = getattr(stats, divergence)
        return weights * distance, {"answers": torch.where(answers, distance.detach(), 0.0)}

    def sums(scaled: Tensor, own: LMHead) -> tuple[Tensor, Tensor]:
        total, metrics = linear_objective(
            scaled,
            own,
            target,
            teacher_head,
            None,
            objective,
            inputs={"weights": weights, "answers": answers},
            fields=(divergence,),
            vocab_size=vocab_size,
            **options,
        )
        return total, metrics["answers"]

    total, of_answers = _InForwardPass.apply(hidden, head.weight, head, vocab_size, sums)
    return total, {f"standardized_{divergence}_nats": of_answers}


class _InForwardPass(torch.autograd.Function):
    """`sums` of standardised hidden states. Its gradients are taken in the forward pass: a sharded head is not there later."""

    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, head: LMHead, vocab_size: int, sums: Callable
    ) -> tuple[Tensor, Tensor]:
        states, matrix = hidden.detach().requires_grad_(), weight.detach().requires_grad_(weight.requires_grad)
        own = LMHead(matrix, head.bias, head.logit_scale, head.softcap)
        with torch.enable_grad():
            total, of_answers = sums(_scaled(states, own, vocab_size), own)
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


def _scaled(hidden: Tensor, head: LMHead, vocab_size: int) -> Tensor:  # (N, H) -> (N, H)
    """Hidden states whose logits are the standardised ones, but for their mean."""
    return (hidden / (deviations(hidden, head, vocab_size) + TINY)[:, None]).to(hidden)


def deviations(hidden: Tensor, head: LMHead, vocab_size: int) -> Tensor:  # (N, H) -> (N,) fp32, or as hidden in float64
    """The standard deviation of every row's logits, with V - 1 in its divisor. Raises UserError as the divergence does."""
    weight, bias = head.weight[:vocab_size], None if head.bias is None else head.bias[:vocab_size]
    if head.softcap is not None or bias is not None and bias[bias.isfinite()].any():
        raise UserError(
            "method.standardize: logits are standardised of heads without softcap and bias; set it to false"
        )
    if bias is not None:
        weight = weight[bias.isfinite()]
    count = len(weight)
    with torch.autocast(hidden.device.type, enabled=False):
        total, squares = _CentredMoments.apply(weight)  # (H,), (H, H)
        states = hidden.to(total.dtype)
        mean = states @ total / count  # what the rounding of the centre left
        variance = (((states @ squares) * states).sum(-1) - count * mean.square()) / (count - 1)
    return head.logit_scale * variance.clamp(min=torch.finfo(variance.dtype).tiny).sqrt()


class _CentredMoments(torch.autograd.Function):
    """The sum of a matrix's rows W' (V, H) and W'^T W', in fp32 a chunk of rows at a time. W' is the matrix less the mean of
    its rows as fp32 has it, beside which the sum is small and not zero.

    The mean is a constant to the gradient: a variance that is made of both does not change with it.
    """

    @staticmethod
    def forward(ctx, weight: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(weight.dtype, torch.float32)
        centre, total, squares = (
            weight.new_zeros(shape, dtype=dtype) for shape in (weight.shape[1:], weight.shape[1:], weight.shape[1:] * 2)
        )
        for part in weight.split(CHUNK):
            centre += part.to(dtype).sum(0)
        centre /= len(weight)
        for part in weight.split(CHUNK):
            part = part.to(dtype) - centre
            total += part.sum(0)
            squares.addmm_(part.T, part)
        ctx.save_for_backward(weight, centre)
        return total, squares

    @staticmethod
    def backward(ctx, of_total: Tensor, of_squares: Tensor) -> Tensor:
        weight, centre = ctx.saved_tensors
        both, result = of_squares + of_squares.T, torch.empty_like(weight)
        for part, into in zip(weight.split(CHUNK), result.split(CHUNK), strict=True):
            into.copy_(torch.addmm(of_total, part.to(both) - centre, both))
        return result
