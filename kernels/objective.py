"""linear_objective: any per-token loss of TokenStats, with the gradient computed in the forward pass.

A chunk at a time: logits of both models, statistics, the caller's loss on vectors, autograd on those vectors for each
row's coefficients, the gradient with respect to the logits, and its two GEMMs. Three student GEMMs and one
teacher GEMM in all, the least that exact gradients need without keeping logits. A coupled objective waits for the
statistics of all tokens, and the logits are computed once more for their gradient.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from minillm.kernels.argument_checks import check_inputs
from minillm.kernels.arguments import accumulation, prepare
from minillm.kernels.double_backward import guard
from minillm.kernels.entry_point import entry_point
from minillm.kernels.head import Head, Hidden, fp16_headroom, rounded
from minillm.kernels.model_logits import StudentGradients
from minillm.kernels.objective_values import Objective, ObjectiveValues
from minillm.kernels.options import LossOptions, WeightGrad
from minillm.kernels.problem import Problem, Tensors
from minillm.kernels.recompute import add_gradients, compute_statistics, fitted
from minillm.kernels.sparse_teacher import TopK
from minillm.kernels.token_stats import TokenStats


@dataclass(frozen=True)
class Statistic:
    """The objective factor * field: its coefficients are known before any statistic is."""

    field: str
    factor: float

    def __call__(self, stats: TokenStats) -> Tensor:
        return self.factor * getattr(stats, self.field)

    def add_known(self, values: ObjectiveValues, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:  # (C,) each
        """values.rows(statistics), with the derivative as it is known."""
        value = statistics[self.field]
        values.losses.append(self.factor * value)
        return {self.field: torch.full_like(value, self.factor)}


@entry_point
def linear_objective(
    student_hidden: Hidden,  # (..., H_s), N tokens
    student_head: Head,  # weight (V, H_s)
    teacher_hidden: Hidden | TopK | None,  # (..., H_t)
    teacher_head: Head | None,  # weight (V, H_t); None with a TopK
    labels: Tensor | None,  # (...) integers
    objective: Objective,
    *,
    inputs: Mapping[str, Tensor] | None = None,  # (...) or (N,) each
    fields: Iterable[str] | None = None,
    coupled: bool = False,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over kept tokens of objective(stats, **inputs), and its metrics, summed likewise. Scalars, fp32
    (float64 for float64 inputs).

    The gradient with respect to the student's hidden states, weight and bias is computed here and scaled in the
    backward pass; the teacher is a constant. Under torch.compile and torch.export the objective is traced with what
    surrounds it, over all tokens at once, and the backward pass computes the logits a second time.

    Args:
        teacher_hidden, teacher_head: None for both where no field needs them; a TopK and None.
        labels: None keeps every token and offers no log-probabilities.
        objective: called as objective(stats, **inputs) with the TokenStats of a few tokens, C, and the same rows
            of every input, (C,) each; returns the loss of each token (C,), or (loss, {name: metric (C,)}). It must
            treat tokens independently, be made of differentiable torch operations, and read no other tensor that
            requires grad. In fp16 a token's loss should be of order one, or its gradient is lost: divide the sum.
        inputs: constants of each token: advantages, weights, masks; any dtype, no gradient.
        fields: the statistics that the objective may read; None means the eight of TokenStats that the arguments
            allow. Naming them saves work.
        coupled: whether the objective may couple tokens: sums over answers, pairs, groups. It is then called once, with
            statistics and inputs of every token in the layout of the hidden states' leading dimensions (...), which are 0
            (argmaxes -1) where a token is ignored. What it returns in that shape is summed over kept tokens; a loss
            or metric of any other shape is summed as it is, and is 0 where no token is kept. Costs one product more of
            the student, and of the teacher where the gradient reads it, unless a chunk holds all rows.

    Raises:
        ValueError: as linear_token_stats; inputs that require grad or have another shape; an objective that returns
            anything but one loss a token, or depends on a foreign tensor that requires grad.
        TypeError, RuntimeError: as linear_token_stats.
    """
    if options["backend"] == "tiled":
        raise ValueError("backend='tiled' does not offer linear_objective; use backend='triton' or 'auto'")
    if not callable(objective):
        raise ValueError(f"objective must be a function of TokenStats, got a {type(objective).__name__}")
    inputs = check_inputs(inputs)
    problem, tensors = prepare(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, options, fields=fields
    )
    return objective_sum(problem, tensors, objective, inputs, options["weight_grad"], coupled=coupled)


def objective_sum(
    problem: Problem,
    tensors: Tensors,
    objective: Objective,
    inputs: Mapping[str, Tensor],
    weight_grad: WeightGrad,
    *,
    coupled: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """linear_objective on checked arguments, of a backend that offers it."""
    into = accumulation(weight_grad, tensors, problem.logits)
    inputs = {name: _check_input(name, value, problem, tensors) for name, value in inputs.items()}
    leaves = tensors.leaves
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in leaves)
    dtypes = [problem.logits if isinstance(one, Tensor) else one for one in into]
    loss, metrics, sums = sum_and_gradients(problem, tensors, objective, inputs, needs, dtypes, coupled=coupled)
    if sums is not None:
        loss = attach_gradients(loss, into, leaves, sums)
    return loss, metrics


def attach_gradients(
    loss: Tensor,  # ()
    into: Sequence[torch.dtype | Tensor],  # for each head: as `accumulation` gives it
    leaves: Sequence[Tensor | None],
    sums: StudentGradients,
) -> Tensor:
    """The loss with gradients by the leaves that are known already."""
    return _Attach.apply(loss, into, *leaves, *sums.totals)


def sum_and_gradients(
    problem: Problem,
    tensors: Tensors,
    objective: Objective,
    inputs: Mapping[str, Tensor],  # (N,) each
    needs: Sequence[bool],  # of every leaf
    into: Sequence[torch.dtype],  # for each head: the dtype of its weight's sum
    *,
    coupled: bool = False,
) -> tuple[Tensor, dict[str, Tensor], StudentGradients | None]:
    """objective_sum without a graph, and the gradients by the leaves that need one; None where none does."""
    with torch.no_grad(), torch.autocast(tensors.device.type, enabled=False):
        sums = problem.gradients(tensors, needs, into)
        values = ObjectiveValues(objective, graded=sums is not None)
        (_all_at_once if coupled else _chunk_by_chunk)(problem, tensors, values, inputs, sums)
        loss, metrics = values.result()
    return loss, metrics, sums


def _chunk_by_chunk(
    problem: Problem,
    tensors: Tensors,
    values: ObjectiveValues,
    inputs: Mapping[str, Tensor],  # (N,) each
    sums: StudentGradients | None,
) -> None:
    headroom = 1.0 if sums is None else fp16_headroom(sums.dz_dtype)
    for chunk in problem.chunks(tensors, sums=sums):
        given = {name: value[chunk.rows] for name, value in inputs.items()}

        def differentiate(rows: slice, statistics: dict[str, Tensor], given=given) -> dict[str, Tensor]:
            if isinstance(values.objective, Statistic) and values.graded:  # no autograd: an operator is below it
                found = values.objective.add_known(values, statistics)
            else:
                found = values.rows(statistics, {name: value[rows] for name, value in given.items()})
            return found if headroom == 1.0 else {name: headroom * value for name, value in found.items()}

        logits = chunk.student, chunk.teacher, chunk.labels
        if sums is None:
            statistics = problem.rows.row_statistics(*logits, problem.spec)
            differentiate(slice(None), {name: statistics[name] for name in problem.spec.fields})
        elif isinstance(values.objective, Statistic) and problem.backend == "triton":
            statistic = values.objective
            known = {statistic.field: headroom * statistic.factor}
            statistics, dz = problem.rows.row_known_gradients(*logits, problem.spec, known, sums.dz_dtype)
            values.losses.append(statistic.factor * statistics[statistic.field])
            sums.add(dz, chunk.student_logits, chunk.rows)
        else:
            dz = problem.rows.row_loss_gradients(*logits, problem.spec, differentiate, sums.dz_dtype)
            if dz is not None:
                sums.add(dz, chunk.student_logits, chunk.rows)
    if headroom != 1.0:
        sums.scale(1 / headroom)
    if not values.losses:  # no row is kept: the objective says which metrics there are
        values.graded = False
        values.rows(problem.empty_statistics(tensors.device), {name: value[:0] for name, value in inputs.items()})


def _all_at_once(
    problem: Problem,
    tensors: Tensors,
    values: ObjectiveValues,
    inputs: Mapping[str, Tensor],  # (N,) each
    sums: StudentGradients | None,
) -> None:
    """The objective between two passes over the logits; one, where a chunk holds all rows."""

    def differentiate(statistics: dict[str, Tensor]) -> dict[str, Tensor]:  # (K,) each -> (K,) each
        every = {name: problem.spread(statistics[name], tensors.kept) for name in problem.spec.fields}
        given = {name: _zero_where_ignored(value, tensors.kept) for name, value in inputs.items()}
        shaped = ({name: value.view(problem.shape) for name, value in rows.items()} for rows in (every, given))
        found = {name: value.reshape(-1) for name, value in values.all_rows(*shaped, tensors.kept).items()}
        return found if tensors.kept is None else {name: value[tensors.kept] for name, value in found.items()}

    if sums is None or problem.kept > problem.chunk or not problem.kept:
        statistics = compute_statistics(problem, tensors, graded=sums is not None)
        coefficients = differentiate(statistics)
        if sums is not None:
            add_gradients(problem, tensors, statistics, coefficients, sums)
        return
    (chunk,) = problem.chunks(tensors, sums=sums)
    logits = chunk.student, chunk.teacher, chunk.labels
    statistics = problem.rows.row_statistics(*logits, problem.spec)
    coefficients, factor = fitted(problem, differentiate(statistics))
    if coefficients:
        dz = problem.rows.row_gradients(*logits, statistics, coefficients, problem.spec, sums.dz_dtype)
        sums.add(dz, chunk.student_logits, chunk.rows)
    if factor is not None:
        sums.scale(factor)


def _zero_where_ignored(value: Tensor, kept: Tensor | None) -> Tensor:  # (N,), (K,) -> (N,)
    return value if kept is None else torch.zeros_like(value).index_copy_(0, kept, value[kept])


def _check_input(name: str, value: Tensor, problem: Problem, tensors: Tensors) -> Tensor:
    if not isinstance(value, Tensor) or value.shape not in (problem.shape, (tensors.rows,)):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"inputs[{name!r}] must have shape {tuple(problem.shape)}, one value a token; got {got}")
    if value.requires_grad:
        raise ValueError(f"inputs[{name!r}] requires grad, but inputs are constants here: detach it")
    if value.device != tensors.device:
        raise ValueError(f"inputs[{name!r}] is on {value.device}, student_hidden on {tensors.device}")
    return value.reshape(-1)


class _Attach(torch.autograd.Function):
    """A loss with gradients that are known already: the backward pass scales them."""

    @staticmethod
    def forward(ctx, loss: Tensor, into: Sequence[torch.dtype | Tensor], *leaves_and_totals: Tensor | None):
        ctx.into = into
        ctx.save_for_backward(*leaves_and_totals)
        return loss.clone()

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        leaves, totals = saved[: len(saved) // 2], list(saved[len(saved) // 2 :])
        with torch.no_grad():
            for index, into in enumerate(ctx.into):
                weight = 3 * index + 1
                if isinstance(into, Tensor) and totals[weight] is not None:
                    into.addcmul_(totals[weight], grad_output)  # in fp32, not rounded to the weight's dtype
                    totals[weight] = None
            scaled = [
                None if total is None else rounded(total, grad_output, leaf.dtype)
                for total, leaf in zip(totals, leaves, strict=True)
            ]
        return (None, None, *guard(scaled, leaves), *[None] * len(totals))
