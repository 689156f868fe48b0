"""One table: every per-token statistic of two rows of logits, its value, and how it enters the gradient.

Notation, for one token: z_s, z_t the logits of student and teacher after scale, softcap and temperature;
q = softmax(z_s), p = softmax(z_t), r_j = log(q_j / p_j), m the mixture of a divergence. For a loss with coefficient
c_f on statistic f, and u_f = d f / d q,

    dZ_j = q_j * (sum_f c_f u_fj - sum_f c_f E_q[u_f])
           + c_forward_kl * (q_j - p_j) + c_interpolated_cross_entropy * (q_j - p_t,j)
           + c_student_logprob * (1[j = y] - q_j)

with p_t = softmax((1 - t) z_s + t z_t), t the interpolation, a constant of which no derivative is taken. An id that
either model bans has p_t = 0; at t = 1, p_t = p whatever the student bans, and at t = 0, p_t = q.

Only r, q, p and their logarithms enter the table. Minus infinity (a banned or padded id) is folded into r once:
r = 0 where both logits are -inf, r = -FAR where the student's alone is, r = +FAR where the teacher's alone is. As the
probability beside it is exactly 0, FAR never shows, except in the two KLs, which become infinite where they truly are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.kernels.block_memory import FRESH, BlockMemory

FAR = 1e30  # stands for an infinite log-ratio: 0 * FAR is 0 where 0 * inf would be NaN


@dataclass(frozen=True)
class RowSpec:
    """The fields that row operations compute, and the way from raw logits: z = softcap(scale * raw) / temperature."""

    fields: tuple[str, ...]  # names of FIELDS
    temperature: float = 1.0
    student_scale: float = 1.0
    student_softcap: float | None = None
    teacher_scale: float = 1.0
    teacher_softcap: float | None = None
    beta: float = 0.5  # jsd: m = beta p + (1 - beta) q
    alpha: float = 0.1  # skew_forward_kl: m = alpha p + (1 - alpha) q; skew_reverse_kl: m = (1 - alpha) p + alpha q
    interpolation: float = 0.4  # t of interpolated_cross_entropy

    def needs(self, what: str) -> bool:
        """True where any field needs the `teacher`, the `labels`, or a `second_pass`."""
        return any(getattr(FIELDS[name], what) for name in self.fields)


@dataclass
class Rows:
    """The distributions of B rows, as the table reads them."""

    q: Tensor  # (B, V)
    log_q: Tensor | None = None  # (B, V), 0 where q is 0 because its logit is -inf
    p: Tensor | None = None  # (B, V)
    log_p: Tensor | None = None  # (B, V), 0 where p is 0 because its logit is -inf
    r: Tensor | None = None  # (B, V), see the module
    target: Tensor | None = None  # (B, V) p_t, the softmax of the interpolated logits
    student_banned: Tensor | None = None  # (B, V) bool: the student's logit is -inf; None where none is
    student_only: Tensor | None = None  # (B,) bool: some id has q > 0 and p = 0; None where no logit is -inf
    teacher_only: Tensor | None = None  # (B,) bool: some id has p > 0 and q = 0
    memory: BlockMemory = FRESH

    def mean(self, weights: Tensor, values: Tensor) -> Tensor:  # (B, V), (B, V) -> (B,)
        return expectation(weights, values, self.memory)


def expectation(weights: Tensor, values: Tensor, memory: BlockMemory = FRESH) -> Tensor:
    """sum_j weights_j values_j for each row: (B, V), (B, V) -> (B,)."""
    with memory.passing():
        return torch.mul(weights, values, out=memory.like(weights)).sum(-1)


def log_mixture(r: Tensor, weight: float, memory: BlockMemory = FRESH) -> tuple[Tensor, Tensor]:
    """(log m - log p, log m - log q) of m = weight p + (1 - weight) q, from r alone: no overflow, no cancellation."""
    near = torch.abs(r, out=memory.like(r)).neg_().exp_()  # exp(-|r|), the smaller probability over the larger
    over_p = memory.like(r)
    with memory.passing():
        # on the device of r: a scalar of the host would be waited for
        larger = (torch.full((), value, dtype=r.dtype, device=r.device) for value in (1 - weight, weight))
        share = torch.where(torch.gt(r, 0, out=memory.like(r, torch.bool)), *larger, out=memory.like(r))
        # share is the weight of the larger one; log_m = log m - max(log p, log q)
        rest = torch.neg(share, out=memory.like(r)).add_(1)
        log_m = near.mul_(rest).add_(share).log_()
        return torch.clamp(r, min=0, out=over_p).add_(log_m), log_m.sub_(torch.clamp(r, max=0, out=rest))


def _reverse_kl(rows: Rows, spec: RowSpec) -> Tensor:
    return _infinite(rows.mean(rows.q, rows.r), rows.student_only)


def _forward_kl(rows: Rows, spec: RowSpec) -> Tensor:
    return _infinite(rows.mean(rows.p, rows.r).neg_(), rows.teacher_only)


def _infinite(value: Tensor, where: Tensor | None) -> Tensor:
    # added, so that a NaN stays a NaN
    return value if where is None else value + torch.where(where, math.inf, 0.0).to(value.dtype)


def _student_entropy(rows: Rows, spec: RowSpec) -> Tensor:
    return rows.mean(rows.q, rows.log_q).neg_()


def _teacher_entropy(rows: Rows, spec: RowSpec) -> Tensor:
    return rows.mean(rows.p, rows.log_p).neg_()


def _interpolated_cross_entropy(rows: Rows, spec: RowSpec) -> Tensor:
    # below t = 1 the target has no id that the student bans
    return _infinite(rows.mean(rows.target, rows.log_q).neg_(), rows.teacher_only if spec.interpolation == 1 else None)


def _jsd(rows: Rows, spec: RowSpec) -> Tensor:
    over_p, over_q = log_mixture(rows.r, spec.beta, rows.memory)
    return -spec.beta * rows.mean(rows.p, over_p) - (1 - spec.beta) * rows.mean(rows.q, over_q)


def _jsd_u(rows: Rows, spec: RowSpec) -> Tensor:
    return log_mixture(rows.r, spec.beta, rows.memory)[1].mul_(spec.beta - 1)


def _skew_forward_kl(rows: Rows, spec: RowSpec) -> Tensor:
    return rows.mean(rows.p, log_mixture(rows.r, spec.alpha, rows.memory)[0]).neg_()


def _skew_forward_kl_u(rows: Rows, spec: RowSpec) -> Tensor:
    return log_mixture(rows.r, spec.alpha, rows.memory)[0].neg_().exp_().mul_(spec.alpha - 1)


def _skew_reverse_kl(rows: Rows, spec: RowSpec) -> Tensor:
    return rows.mean(rows.q, log_mixture(rows.r, 1 - spec.alpha, rows.memory)[1]).neg_()


def _skew_reverse_kl_u(rows: Rows, spec: RowSpec) -> Tensor:
    log_share = log_mixture(rows.r, 1 - spec.alpha, rows.memory)[1].neg_()  # log q/m
    with rows.memory.passing():
        return log_share.sub_(torch.exp(log_share, out=rows.memory.like(log_share)), alpha=spec.alpha)


def _tvd(rows: Rows, spec: RowSpec) -> Tensor:
    return torch.sub(rows.q, rows.p, out=rows.memory.like(rows.q)).abs_().sum(-1).mul_(0.5)


def _tvd_u(rows: Rows, spec: RowSpec) -> Tensor:
    return torch.sign(rows.r, out=rows.memory.like(rows.r)).mul_(0.5)


@dataclass(frozen=True)
class Field:
    """One row of the table."""

    teacher: bool = False  # needs the teacher's logits
    labels: bool = False  # needs the label
    differentiable: bool = False  # with respect to the student
    # (B,) from rows of (B, V); None for what is read off directly: selected log-probabilities and argmaxes
    value: Callable[[Rows, RowSpec], Tensor] | None = None
    # (B, V), up to a constant a row, where the value is not its mean under q: the divergences from a mixture, and tvd
    u: Callable[[Rows, RowSpec], Tensor] | None = None

    @property
    def second_pass(self) -> bool:
        """True where an online pass is not enough: normalised probabilities of both models must be known first."""
        return self.u is not None


FIELDS: dict[str, Field] = {
    "student_logprob": Field(labels=True, differentiable=True),  # log q_y
    "teacher_logprob": Field(teacher=True, labels=True),  # log p_y
    "reverse_kl": Field(teacher=True, differentiable=True, value=_reverse_kl),  # E_q[r]; u = r, its mean is the value
    "forward_kl": Field(teacher=True, differentiable=True, value=_forward_kl),  # -E_p[r]; q u = -p
    "student_entropy": Field(differentiable=True, value=_student_entropy),  # u = -log q, its mean is the value
    "teacher_entropy": Field(teacher=True, value=_teacher_entropy),
    "student_argmax": Field(),  # the lowest id with the largest logit
    "teacher_argmax": Field(teacher=True),
    # -E_p_t[log q], the cross-entropy to the interpolated target (TAID, arXiv 2501.16937); q u = -p_t
    "interpolated_cross_entropy": Field(teacher=True, differentiable=True, value=_interpolated_cross_entropy),
    # beta E_p[log p/m] + (1 - beta) E_q[log q/m]; u = (1 - beta) log q/m
    "jsd": Field(teacher=True, differentiable=True, value=_jsd, u=_jsd_u),
    # E_p[log p/m]; u = -(1 - alpha) p/m
    "skew_forward_kl": Field(teacher=True, differentiable=True, value=_skew_forward_kl, u=_skew_forward_kl_u),
    # E_q[log q/m]; u = log q/m - alpha q/m
    "skew_reverse_kl": Field(teacher=True, differentiable=True, value=_skew_reverse_kl, u=_skew_reverse_kl_u),
    # sum |p - q| / 2; u = sign(r) / 2
    "tvd": Field(teacher=True, differentiable=True, value=_tvd, u=_tvd_u),
}
DIVERGENCES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "interpolated_cross_entropy",
)
