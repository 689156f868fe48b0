"""Statistics of all kept rows, and afterwards their gradient from logits that are computed a second time.

Four student GEMMs and two teacher GEMMs, for coefficients that are known only when every statistic is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.kernels.divergences import FIELDS
from minillm.kernels.head import fp16_headroom, rounded
from minillm.kernels.model_logits import StudentGradients
from minillm.kernels.problem import Problem, Tensors


def compute_statistics(problem: Problem, tensors: Tensors, *, graded: bool) -> dict[str, Tensor]:
    """Every statistic and what the gradient needs, (K,) each. `graded`: whether `compute_gradients` may follow."""
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
        return problem.empty_statistics(tensors.device)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def compute_gradients(
    problem: Problem,
    tensors: Tensors,
    statistics: dict[str, Tensor],  # (K,) each: what compute_statistics returned
    coefficients: dict[str, Tensor],  # (K,) each: d loss / d field; absent means zero
    needs: Sequence[bool],  # of every leaf
    into: Sequence[torch.dtype | Tensor],  # for each head: the dtype of its weight's sum, or a tensor to add into
) -> list[Tensor | None]:
    """The gradient of every leaf of the student, in its dtype; None for what went into a tensor of the caller's."""
    coefficients, factor = fitted(problem, coefficients)
    if problem.backend == "tiled":
        from minillm.kernels.tiles import tile_gradients

        return tile_gradients(problem, tensors, statistics, coefficients, needs, into[0], factor)
    # with a factor, what goes into a caller's tensor is multiplied first
    later = [factor is not None and isinstance(one, Tensor) for one in into]
    sums = problem.gradients(
        tensors, needs, [problem.logits if wait else one for one, wait in zip(into, later, strict=True)]
    )
    _add_chunks(problem, tensors, statistics, coefficients, sums)
    totals = list(sums.totals)
    for index, one in enumerate(into):
        weight = 3 * index + 1
        if isinstance(one, Tensor) and totals[weight] is not None:
            if later[index]:
                one.addcmul_(totals[weight], factor)
            totals[weight] = None
    return [
        None if total is None else rounded(total, factor, leaf.dtype)
        for total, leaf in zip(totals, tensors.leaves, strict=True)
    ]


def add_gradients(
    problem: Problem,
    tensors: Tensors,
    statistics: dict[str, Tensor],  # (K,) each: what compute_statistics returned
    coefficients: dict[str, Tensor],  # (K,) each: d loss / d field; absent means zero
    sums: StudentGradients,  # of nothing yet
) -> None:
    """compute_gradients, but for the rounding: a factor of the loss is still to come."""
    coefficients, factor = fitted(problem, coefficients)
    _add_chunks(problem, tensors, statistics, coefficients, sums)
    if factor is not None:
        sums.scale(factor)


def _add_chunks(
    problem: Problem,
    tensors: Tensors,
    statistics: dict[str, Tensor],
    coefficients: dict[str, Tensor],
    sums: StudentGradients,
) -> None:
    if not coefficients:
        return
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
        sums.add(dz, chunk.student_logits, chunk.rows)


def fitted(problem: Problem, coefficients: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """The coefficients over a factor of all, a scalar; None for 1. fp16 ends at 6e-8 and at 65,504: the logits'
    gradients of a mean, or of a scaled loss, would not fit into its products.
    """
    if not (coefficients and problem.kept and torch.float16 in (head.compute for head in problem.student)):
        return coefficients, None
    largest = torch.stack([value.abs().amax() for value in coefficients.values()]).amax()
    power = torch.exp2(torch.log2(largest).floor())  # at most the largest of them, and more than half of it
    factor = torch.where(largest.isfinite() & (largest > 0), power, torch.ones_like(power))
    factor = factor / fp16_headroom(torch.float16)
    return {name: value / factor for name, value in coefficients.items()}, factor
