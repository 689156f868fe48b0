"""TokenStats, and linear_token_stats: per-token statistics of student and teacher from hidden states.

Without autograd one pass; with it the backward pass recomputes the logits, a chunk of rows at a time (tiled: a tile), so
that every statistic takes any upstream gradient: four student GEMMs and two teacher GEMMs (`objective` needs three and
one).
"""

from collections.abc import Iterable, Mapping
from typing import Unpack

import torch
from torch import Tensor

from minillm.kernels.arguments import accumulation, prepare
from minillm.kernels.divergences import FIELDS
from minillm.kernels.double_backward import guard
from minillm.kernels.entry_point import entry_point
from minillm.kernels.head import LMHead
from minillm.kernels.options import LossOptions
from minillm.kernels.problem import Problem, Tensors


class TokenStats:
    """Per-token statistics in nats, one tensor each, read as attributes. p is the teacher's, q the student's row.

    student_logprob log q(y), teacher_logprob log p(y), reverse_kl KL(q || p), forward_kl KL(p || q),
    student_entropy, teacher_entropy, student_argmax, teacher_argmax (int64); where asked for by name also
    jsd, skew_forward_kl, skew_reverse_kl, tvd. Reading what was not computed raises an AttributeError that says so.
    """

    student_logprob: Tensor
    teacher_logprob: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_argmax: Tensor
    teacher_argmax: Tensor
    jsd: Tensor
    skew_forward_kl: Tensor
    skew_reverse_kl: Tensor
    tvd: Tensor

    def __init__(self, values: Mapping[str, Tensor]):
        self.__dict__.update(values)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the statistics that are here."""
        return tuple(self.__dict__)

    @property
    def reward(self) -> Tensor:
        """log p(y) - log q(y), the reward of a sampled token (MiniLLM, arXiv 2306.08543, section 2.2)."""
        values = self.__dict__
        self._require("teacher_logprob", "student_logprob")
        return values["teacher_logprob"] - values["student_logprob"]

    def _require(self, *names: str) -> None:
        missing = [name for name in names if name not in self.__dict__]
        if missing:
            raise AttributeError(
                f"{', '.join(missing)} not computed; pass fields=("
                f"{', '.join(repr(name) for name in (*self.fields, *missing))})"
            )

    def __getattr__(self, name: str) -> Tensor:
        if name == "reward":  # the property raised: let its reason be heard
            self._require("teacher_logprob", "student_logprob")
        if name in FIELDS:
            self._require(name)
        raise AttributeError(f"TokenStats has no attribute {name!r}; its statistics are {', '.join(self.fields)}")

    def __repr__(self) -> str:
        return f"TokenStats({', '.join(f'{name}: {tuple(value.shape)}' for name, value in self.__dict__.items())})"


@entry_point
def linear_token_stats(
    student_hidden: Tensor,  # (..., H_s), N tokens
    student_head: LMHead | Tensor,  # weight (V, H_s)
    teacher_hidden: Tensor | None,  # (..., H_t)
    teacher_head: LMHead | Tensor | None,  # weight (V, H_t)
    labels: Tensor | None,  # (...) integers
    *,
    fields: Iterable[str] | None = None,
    **options: Unpack[LossOptions],
) -> TokenStats:
    """Statistics of every token, (...) each, fp32 (float64 for float64 inputs), in nats; no full logits anywhere.

    Logits are softcap(logit_scale * (h W^T + b)) / temperature for both models. Ignored tokens (label ignore_index)
    get 0, and -1 for the argmaxes; they reach no GEMM. Every float statistic of the student is differentiable with
    respect to the student's hidden states, weight and bias, for any upstream gradient; the teacher is a constant.

    Args:
        fields: the statistics to compute; None means the eight of TokenStats, less those that need a teacher or
            labels that are None.

    Raises:
        ValueError: shapes, dtypes, devices, vocabularies or labels that do not fit, a wrapped or sharded head.
        TypeError: an unknown argument.
        RuntimeError: on double backward, and under the transforms of torch.func.
    """
    problem, tensors = prepare(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, options, fields=fields
    )
    return token_stats(problem, tensors, options["weight_grad"])


def token_stats(problem: Problem, tensors: Tensors, weight_grad: str | Tensor) -> TokenStats:
    """linear_token_stats on checked arguments."""
    into = accumulation(weight_grad, tensors.student_weight, problem.logits)
    graded = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors[:3])
    values = _TokenStats.apply(problem, into, graded, *tensors)
    return TokenStats(
        {name: value.reshape(problem.shape) for name, value in zip(problem.spec.fields, values, strict=True)}
    )


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, problem: Problem, into: torch.dtype | Tensor, graded: bool, *flat: Tensor | None):
        tensors = Tensors(*flat)
        statistics = _statistics(problem, tensors, graded)
        names = [name for name in statistics if not name.endswith("argmax")]
        ctx.problem, ctx.into, ctx.names = problem, into, names
        ctx.save_for_backward(*tensors, *(statistics[name] for name in names))
        ctx.set_materialize_grads(False)
        fields = problem.spec.fields
        values = tuple(problem.spread(statistics[name], tensors.kept).clone() for name in fields)
        ctx.mark_non_differentiable(
            *(value for name, value in zip(fields, values, strict=True) if not FIELDS[name].differentiable)
        )
        return values

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor | None):
        problem: Problem = ctx.problem
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        count = len(Tensors._fields)
        tensors = Tensors(*saved[:count])
        statistics = dict(zip(ctx.names, saved[count:], strict=True))
        coefficients = {}
        for name, gradient in zip(problem.spec.fields, grad_outputs, strict=True):
            if gradient is not None and FIELDS[name].differentiable:
                gradient = gradient.detach().to(problem.logits)
                coefficients[name] = gradient if tensors.kept is None else gradient[tensors.kept]
        needs = ctx.needs_input_grad[3:6]
        with torch.no_grad(), torch.autocast(tensors.student_hidden.device.type, enabled=False):
            gradients = _gradients(problem, tensors, statistics, coefficients, needs, ctx.into)
        return (None, None, None, *guard(gradients, tensors[:3]), None, None, None, None, None)


def _gradients(
    problem: Problem,
    tensors: Tensors,
    statistics: dict[str, Tensor],  # (K,) each
    coefficients: dict[str, Tensor],  # (K,) each: d loss / d field
    needs: tuple[bool, bool, bool],
    into: torch.dtype | Tensor,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of student_hidden, student_weight and student_bias, in their dtypes."""
    factor = None
    if problem.student_compute == torch.float16 and coefficients and problem.kept:
        # fp16 ends at 6e-8 and at 65,504: logits' gradients of a mean, or of a scaled loss, would not fit
        factor = _power_of_two(coefficients)
        coefficients = {name: value / factor for name, value in coefficients.items()}
    if problem.backend == "tiled":
        from minillm.kernels.tiles import tile_gradients

        return tile_gradients(problem, tensors, statistics, coefficients, needs, into, factor)
    return _chunk_gradients(problem, tensors, statistics, coefficients, needs, into, factor)


def _chunk_gradients(
    problem: Problem,
    tensors: Tensors,
    statistics: dict[str, Tensor],
    coefficients: dict[str, Tensor],
    needs: tuple[bool, bool, bool],
    into: torch.dtype | Tensor,
    factor: Tensor | None,  # (), of all gradients
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    later = factor is not None and isinstance(into, Tensor)  # what goes into the caller's tensor is multiplied first
    sums = problem.gradients(tensors, needs, problem.logits if later else into)
    if coefficients:
        needs_teacher = any(FIELDS[name].teacher for name in coefficients)
        for chunk in problem.chunks(tensors, sums=sums, teacher=needs_teacher):
            dz = problem.rows.row_gradients(
                chunk.student,
                chunk.teacher,
                chunk.labels,
                {name: value[chunk.slice] for name, value in statistics.items()},
                {name: value[chunk.slice] for name, value in coefficients.items()},
                problem.spec,
                sums.dz_dtype,
            )
            sums.add(dz, chunk.hidden, chunk.rows)
        chunk = dz = None  # the logits' memory goes before the weight's gradient is cast
    if factor is None:
        return sums.results(tensors[:3])
    if later and needs[1]:
        into.addcmul_(sums.weight, factor)
    hidden, weight, bias = (None if one is None else one.mul_(factor) for one in sums.results(tensors[:3]))
    return hidden, None if later else weight, bias


def _power_of_two(coefficients: dict[str, Tensor]) -> Tensor:
    """At most the largest of them, and more than half of it; 1 where that is no positive number. A scalar there."""
    largest = torch.stack([value.abs().amax() for value in coefficients.values()]).amax()
    power = torch.exp2(torch.log2(largest).floor())
    return torch.where(largest.isfinite() & (largest > 0), power, torch.ones_like(power))


def _statistics(problem: Problem, tensors: Tensors, graded: bool) -> dict[str, Tensor]:
    """Every statistic and what the gradient needs, (K,) each."""
    with torch.autocast(tensors.student_hidden.device.type, enabled=False):
        if problem.backend == "tiled" and problem.kept and graded:
            from minillm.kernels.tiles import tile_statistics

            return tile_statistics(problem, tensors)
        if problem.backend == "tiled" and problem.kept:
            from minillm.kernels.tiled_triton import tiled_stats

            return tiled_stats(*problem.tiled_arguments(tensors), problem.spec)
        parts = [
            problem.rows.row_statistics(chunk.student, chunk.teacher, chunk.labels, problem.spec)
            for chunk in problem.chunks(tensors)
        ]
    if not parts:
        return problem.empty_statistics(tensors.student_hidden.device)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
