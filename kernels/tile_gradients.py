"""The gradient of the no-logits engine: recomputed a tile of rows and ids at a time, from statistics of whole rows.

Where the statistics of a row are known, the gradient with respect to one of its logits needs that logit alone. So the
logits of a few rows and ids are computed, turned into their gradient in place and multiplied out: four student GEMMs
and two teacher GEMMs with those of the statistics. Ids are the outer loop: the weight's gradient of a slice of ids is
summed over all rows in fp32 and rounded into its place, and no fp32 sum of the whole weight exists. Beside the
gradients there are a tile's logits, a slice's sum and the fp32 sum of the hidden states.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.kernels.chunks import TILE_IDS, logits_buffer
from minillm.kernels.divergences import FIELDS
from minillm.kernels.head import add_product, logits_gradient_dtype, project
from minillm.kernels.problem import Problem, Tensors
from minillm.kernels.rows_triton import row_gradients

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def tile_gradients(
    problem: Problem,
    tensors: Tensors,
    statistics: dict[str, Tensor],  # (K,) each: what tiled_stats returned
    coefficients: dict[str, Tensor],  # (K,) each: d loss / d field; absent means zero
    needs: tuple[bool, bool, bool],  # of hidden, weight, bias
    into: torch.dtype | Tensor,  # a tensor (V, H_s) to add the weight's gradient to, which is then not returned
) -> Gradients:
    """d loss / d (student_hidden, student_weight, student_bias), each in the dtype of its tensor."""
    hidden, _, bias = tensors[:3]
    # in a function of its own, so that a tile's logits are gone before the sums are rounded
    hidden_sum, weight_grad, bias_sum = _sums(problem, tensors, statistics, coefficients, needs, into)
    hidden_grad = None if hidden_sum is None else hidden_sum.to(hidden.dtype)
    if hidden_grad is not None and tensors.kept is not None:
        every_row = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        hidden_grad = every_row.index_copy_(0, tensors.kept, hidden_grad)
    return hidden_grad, weight_grad, None if bias_sum is None else bias_sum.to(bias.dtype)


def _sums(
    problem: Problem,
    tensors: Tensors,
    statistics: dict[str, Tensor],
    coefficients: dict[str, Tensor],
    needs: tuple[bool, bool, bool],
    into: torch.dtype | Tensor,
) -> Gradients:
    """Of kept hidden states (K, H_s) and bias (V,) in the dtype of the logits; of the weight in its own."""
    device, dtype = tensors.student_hidden.device, problem.logits
    dz_dtype = logits_gradient_dtype(problem.student_compute, dtype, device)
    rows = list(_rows(problem, tensors, statistics, coefficients, dz_dtype))
    teacher = bool(rows) and rows[0].teacher is not None
    student_out, teacher_out = (
        logits_buffer(problem.chunk, min(TILE_IDS, problem.vocab_size), dtype, device) if wanted else None
        for wanted in (True, teacher)
    )
    hidden, weight, bias = tensors[:3]
    hidden_sum = torch.zeros(problem.kept, hidden.shape[1], dtype=dtype, device=device) if needs[0] else None
    bias_sum = torch.zeros_like(bias, dtype=dtype) if needs[2] else None
    slice_sum = torch.empty(TILE_IDS, weight.shape[1], dtype=dtype, device=device) if needs[1] else None
    weight_grad = torch.zeros_like(weight) if needs[1] and not isinstance(into, Tensor) else None
    for start in range(0, problem.vocab_size, TILE_IDS) if rows else ():
        ids = slice(start, min(start + TILE_IDS, problem.vocab_size))
        width = ids.stop - start
        student_part = weight[ids].to(problem.student_compute).to(dz_dtype)
        teacher_part = tensors.teacher_weight[ids].to(problem.teacher_compute) if teacher else None
        for part in rows:
            size = part.student.shape[0]
            out = student_out[:size, :width]
            z_s, z_t = project(part.student, student_part, _cut(bias, ids), problem.student_compute, out), None
            if teacher:
                out, teacher_bias = teacher_out[:size, :width], _cut(tensors.teacher_bias, ids)
                z_t = project(part.teacher, teacher_part, teacher_bias, problem.teacher_compute, out)
            # a label outside the tile equals no id of it, and is not read otherwise
            labels = None if part.labels is None else part.labels - start
            dz = row_gradients(z_s, z_t, labels, part.statistics, part.coefficients, problem.spec, dz_dtype)
            if hidden_sum is not None:
                add_product(hidden_sum[part.slice], dz, student_part)
            if slice_sum is not None:
                add_product(slice_sum[:width], dz.t(), part.student, first=part is rows[0])
            if bias_sum is not None:
                bias_sum[ids] += dz.sum(0, dtype=dtype)
        if weight_grad is not None:
            weight_grad[ids] = slice_sum[:width]
        elif slice_sum is not None:
            into[ids] += slice_sum[:width]
    return hidden_sum, weight_grad, bias_sum


class _RowsPart(NamedTuple):
    """Some kept rows, as every tile of them needs them."""

    slice: slice  # of the K kept rows
    student: Tensor  # (C, H_s) in the dtype of the logits' gradient
    teacher: Tensor | None  # (C, H_t); None where no coefficient needs the teacher
    labels: Tensor | None  # (C,)
    statistics: dict[str, Tensor]  # (C,) each
    coefficients: dict[str, Tensor]  # (C,) each


def _rows(
    problem: Problem,
    tensors: Tensors,
    statistics: dict[str, Tensor],
    coefficients: dict[str, Tensor],
    dz_dtype: torch.dtype,
) -> Iterator[_RowsPart]:
    if not coefficients:  # nothing upstream: all gradients are zero
        return

    def kept(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensors.kept is None else tensor[tensors.kept]

    student = kept(tensors.student_hidden).to(problem.student_compute).to(dz_dtype)
    teacher = None
    if any(FIELDS[name].teacher for name in coefficients):
        teacher = kept(tensors.teacher_hidden).to(problem.teacher_compute)
    labels = kept(tensors.labels)
    for part in problem.slices():
        yield _RowsPart(
            part,
            student[part],
            _cut(teacher, part),
            _cut(labels, part),
            {name: value[part] for name, value in statistics.items()},
            {name: value[part] for name, value in coefficients.items()},
        )


def _cut(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor[part]
