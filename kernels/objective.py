"""linear_objective: any per-token loss of TokenStats, with the gradient computed in the forward pass.

A chunk at a time: logits of both models, statistics, the caller's loss on vectors, autograd on those vectors for each
row's coefficients, the gradient with respect to the logits, and its two GEMMs. Three student GEMMs and one
teacher GEMM in all, the least that exact gradients need without keeping logits.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from minillm.kernels.arguments import accumulation, prepare
from minillm.kernels.divergences import FIELDS
from minillm.kernels.double_backward import guard
from minillm.kernels.entry_point import entry_point
from minillm.kernels.head import LMHead, rounded
from minillm.kernels.model_logits import StudentGradients
from minillm.kernels.options import LossOptions
from minillm.kernels.problem import Problem, Tensors
from minillm.kernels.token_stats import TokenStats

Objective = Callable[..., Tensor | tuple[Tensor, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Statistic:
    """The objective factor * field: its coefficients are known before any statistic is."""

    field: str
    factor: float

    def __call__(self, stats: TokenStats) -> Tensor:
        return self.factor * getattr(stats, self.field)


@entry_point
def linear_objective(
    student_hidden: Tensor,  # (..., H_s), N tokens
    student_head: LMHead | Tensor,  # weight (V, H_s)
    teacher_hidden: Tensor | None,  # (..., H_t)
    teacher_head: LMHead | Tensor | None,  # weight (V, H_t)
    labels: Tensor | None,  # (...) integers
    objective: Objective,
    *,
    inputs: Mapping[str, Tensor] | None = None,  # (...) or (N,) each
    fields: Iterable[str] | None = None,
    **options: Unpack[LossOptions],
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over kept tokens of objective(stats, **inputs), and its metrics, summed likewise. Scalars, fp32
    (float64 for float64 inputs).

    The gradient with respect to the student's hidden states, weight and bias is computed here and scaled in the
    backward pass; the teacher is a constant.

    Args:
        teacher_hidden, teacher_head: None for both where no field needs them.
        labels: None keeps every token and offers no log-probabilities.
        objective: called as objective(stats, **inputs) with the TokenStats of a few tokens, C, and the same rows
            of every input, (C,) each; returns the loss of each token (C,), or (loss, {name: metric (C,)}). It must
            treat tokens independently, be made of differentiable torch operations, and read no other tensor that
            requires grad. In fp16 a token's loss should be of order one, or its gradient is lost: divide the sum.
        inputs: constants of each token: advantages, weights, masks; any dtype, no gradient.
        fields: the statistics that the objective may read; None means the eight of TokenStats that the arguments
            allow. Naming them saves work.

    Raises:
        ValueError: as linear_token_stats; inputs that require grad or have another shape; an objective that returns
            anything but one loss a token, or depends on a foreign tensor that requires grad.
        TypeError, RuntimeError: as linear_token_stats.
    """
    if options["backend"] == "tiled":
        raise ValueError("backend='tiled' does not offer linear_objective; use backend='triton' or 'auto'")
    problem, tensors = prepare(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, options, fields=fields
    )
    return objective_sum(problem, tensors, objective, inputs or {}, options["weight_grad"])


def objective_sum(
    problem: Problem,
    tensors: Tensors,
    objective: Objective,
    inputs: Mapping[str, Tensor],
    weight_grad: str | Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """linear_objective on checked arguments, of a backend that offers it."""
    into = accumulation(weight_grad, tensors, problem.logits)
    inputs = {name: _check_input(name, value, problem, tensors) for name, value in inputs.items()}
    leaves = tensors.leaves
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in leaves)
    with torch.no_grad(), torch.autocast(tensors.device.type, enabled=False):
        sums = problem.gradients(tensors, needs, [problem.logits if isinstance(one, Tensor) else one for one in into])
        loss, metrics = _run(problem, tensors, objective, inputs, sums)
    if sums is not None:
        loss = _Attach.apply(loss, into, *leaves, *sums.totals)
    return loss, metrics


def _run(
    problem: Problem,
    tensors: Tensors,
    objective: Objective,
    inputs: Mapping[str, Tensor],
    sums: StudentGradients | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    losses: list[Tensor] = []
    metrics: dict[str, list[Tensor]] = {}
    for chunk in problem.chunks(tensors, sums=sums):
        given = {name: value[chunk.rows] for name, value in inputs.items()}

        def evaluate(rows: slice, values: dict[str, Tensor], given=given) -> dict[str, Tensor]:
            here = {name: value[rows] for name, value in given.items()}
            loss, coefficients = _evaluate(objective, values, here, metrics, graded=sums is not None, first=not losses)
            losses.append(loss)
            return coefficients

        logits = chunk.student, chunk.teacher, chunk.labels
        if sums is None:
            statistics = problem.rows.row_statistics(*logits, problem.spec)
            evaluate(slice(None), {name: statistics[name] for name in problem.spec.fields})
        elif isinstance(objective, Statistic) and problem.backend == "triton":
            known = {objective.field: objective.factor}
            statistics, dz = problem.rows.row_known_gradients(*logits, problem.spec, known, sums.dz_dtype)
            losses.append(objective.factor * statistics[objective.field])
            sums.add(dz, chunk.student_logits, chunk.rows)
        else:
            dz = problem.rows.row_loss_gradients(*logits, problem.spec, evaluate, sums.dz_dtype)
            if dz is not None:
                sums.add(dz, chunk.student_logits, chunk.rows)
    if not losses:  # no row is kept: the objective says which metrics there are
        values = problem.empty_statistics(tensors.device)
        here = {name: value[:0] for name, value in inputs.items()}
        losses.append(_evaluate(objective, values, here, metrics, graded=False, first=True)[0])
    return torch.cat(losses).sum(), {name: torch.cat(parts).sum() for name, parts in metrics.items()}


def _evaluate(
    objective: Objective,
    values: dict[str, Tensor],
    inputs: dict[str, Tensor],
    metrics: dict[str, list[Tensor]],
    *,
    graded: bool,
    first: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each token, (C,), and its derivative with respect to each statistic that it depends on."""
    size = next(iter(values.values())).shape
    dtype = next((value.dtype for value in values.values() if value.is_floating_point()), torch.float32)
    with torch.set_grad_enabled(graded):
        leaves = {
            name: value.detach().requires_grad_(graded) for name, value in values.items() if FIELDS[name].differentiable
        }
        result = objective(TokenStats({**values, **leaves}), **inputs)
        loss, extra = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
        if not isinstance(loss, Tensor) or loss.shape != size or not loss.is_floating_point():
            got = f"{tuple(loss.shape)} {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(
                f"objective must return the loss of each of the {size[0]} tokens of a chunk, a floating-point tensor "
                f"of shape {tuple(size)}, or (loss, {{name: metric}}); got {got}"
            )
        coefficients = {}
        if loss.requires_grad:
            if first:
                _check_closure(loss, list(leaves.values()))
            gradients = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
            coefficients = {
                name: gradient.to(dtype)
                for name, gradient in zip(leaves, gradients, strict=True)
                if gradient is not None
            }
    for name, metric in extra.items():
        if not isinstance(metric, Tensor) or metric.shape != size:
            got = tuple(metric.shape) if isinstance(metric, Tensor) else type(metric).__name__
            raise ValueError(f"objective: metric {name!r} must have shape {tuple(size)}, one value a token; got {got}")
        metrics.setdefault(name, []).append(metric.detach().to(dtype))
    return loss.detach().to(dtype), coefficients


def _check_closure(loss: Tensor, leaves: list[Tensor]) -> None:
    """A tensor that the objective captured would silently get no gradient."""
    known = {id(leaf) for leaf in leaves}
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in known:
            raise ValueError(
                "objective depends on a tensor that requires grad and is not one of the statistics (shape "
                f"{tuple(node.variable.shape)}); it would get no gradient here: detach it"
            )
        stack.extend(parent for parent, _ in node.next_functions)


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
