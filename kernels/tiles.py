"""The no-logits engine with a gradient: statistics, and later their gradient, a tile of rows and ids at a time.

A row's gradient at an id needs the row's statistics and the logits of that id alone. So the logits of a few rows and
ids are computed twice: once for the sums that statistics are made of, and in the backward pass to be turned into their
gradient in place and multiplied out. Four student GEMMs and two teacher GEMMs, as of whole rows, but the only logits
are those of a tile, and ids are the outer loop: the weight's gradient of a slice of ids is summed over all rows in fp32
and rounded into its place, so that no fp32 sum of the whole weight exists. Beside the gradients there are a tile's
logits, a slice's sum, the hidden states' fp32 sum, and where rows are ignored copies of the kept ones of both models;
in the forward pass the sums of `share_sums`, up to ten numbers a row and slice of ids.

Both passes make the same products, so that the logits are the same to the last bit: a row's log-sum-exp that came from
other roundings would cost the small gradients of peaked rows their digits. Without a gradient the statistics come from
`tiled_triton`, whose products round otherwise. That is meant, and shows in one place: reentrant activation checkpointing
runs the forward pass without a gradient, so that a loss that goes on from there, squared say, differs in its last bits.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.kernels.chunks import TILE_IDS, logits_buffer
from minillm.kernels.divergences import FIELDS
from minillm.kernels.head import add_product, logits_gradient_dtype, project, rounded
from minillm.kernels.problem import Problem, Tensors
from minillm.kernels.rows_triton import gradient_vectors, gradients_from_vectors
from minillm.kernels.share_sums import ShareSums
from minillm.kernels.tile_sums_triton import tile_sums

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class Tile(NamedTuple):
    rows: slice  # of the K kept rows
    ids: slice
    share: int  # which slice of ids it is
    student_hidden: Tensor  # (C, H_s) in the dtype of the logits' gradient
    student_weight: Tensor  # (W, H_s) likewise
    student: Tensor  # (C, W) raw logits
    teacher: Tensor | None  # (C, W)
    labels: Tensor | None  # (C,)


def tile_statistics(problem: Problem, tensors: Tensors) -> dict[str, Tensor]:
    """The statistics that `rows_torch.row_statistics` returns for the kept rows, (K,) each."""
    teacher = tensors.teacher is not None
    shares, width = -(-problem.vocab_size // TILE_IDS), min(TILE_IDS, problem.vocab_size)
    device = tensors.device
    sums = ShareSums(problem.spec, teacher=teacher, shares=shares, rows=problem.kept, device=device)
    for tile in _tiles(problem, tensors, teacher=teacher):
        tile_sums(
            tile.student,
            tile.teacher,
            tile.labels,
            sums,
            share=tile.share,
            rows=tile.rows,
            first=tile.ids.start,
            block=width,
        )
    return sums.statistics()


def tile_gradients(
    problem: Problem,
    tensors: Tensors,
    statistics: dict[str, Tensor],  # (K,) each: what tile_statistics returned
    coefficients: dict[str, Tensor],  # (K,) each: d loss / d field; absent means zero
    needs: Sequence[bool],  # of hidden, weight, bias
    into: torch.dtype | Tensor,  # a tensor (V, H_s) to add the weight's gradient to, which is then not returned
    factor: Tensor | None,  # (), of all gradients
) -> Gradients:
    """d loss / d (hidden, weight, bias) of the student, each in the dtype of its tensor."""
    ((hidden, _, bias),) = tensors.student
    # in a function of its own, so that a tile's logits are gone before the sums are rounded
    hidden_sum, weight_grad, bias_sum = _sums(problem, tensors, statistics, coefficients, needs, into, factor)
    hidden_grad = rounded(hidden_sum, factor, hidden.dtype)
    if hidden_grad is not None and tensors.kept is not None:
        every_row = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        hidden_grad = every_row.index_copy_(0, tensors.kept, hidden_grad)
    return hidden_grad, weight_grad, None if bias is None else rounded(bias_sum, factor, bias.dtype)


def _sums(
    problem: Problem,
    tensors: Tensors,
    statistics: dict[str, Tensor],
    coefficients: dict[str, Tensor],
    needs: Sequence[bool],
    into: torch.dtype | Tensor,
    factor: Tensor | None,
) -> Gradients:
    """Of kept hidden states (K, H_s) and bias (V,) in the dtype of the logits; of the weight in its own, times the factor."""
    ((hidden, weight, bias),) = tensors.student
    device, dtype = hidden.device, problem.logits
    hidden_sum = torch.zeros(problem.kept, hidden.shape[1], dtype=dtype, device=device) if needs[0] else None
    bias_sum = torch.zeros_like(bias, dtype=dtype) if needs[2] else None
    slice_sum = torch.empty(TILE_IDS, weight.shape[1], dtype=dtype, device=device) if needs[1] else None
    weight_grad = torch.empty_like(weight) if needs[1] and not isinstance(into, Tensor) else None
    written = problem.vocab_size if coefficients and problem.kept else 0
    if weight_grad is not None:
        weight_grad[written:].zero_()
    if not written:
        return hidden_sum, weight_grad, bias_sum
    teacher = any(FIELDS[name].teacher for name in coefficients)
    vectors, slots = gradient_vectors(statistics, coefficients, teacher=teacher)
    for tile in _tiles(problem, tensors, teacher=teacher):
        # a label outside of the tile equals no id of it, and is not read otherwise
        labels = tile.labels - tile.ids.start if "student_logprob" in coefficients else None
        dz = gradients_from_vectors(
            tile.student,
            tile.teacher,
            labels,
            vectors[:, tile.rows],
            slots,
            problem.spec,
            tile.student_hidden.dtype,
        )
        if hidden_sum is not None:
            add_product(hidden_sum[tile.rows], dz, tile.student_weight)
        if bias_sum is not None:
            bias_sum[tile.ids] += dz.sum(0, dtype=dtype)
        if slice_sum is not None:
            total = slice_sum[: dz.shape[1]]
            add_product(total, dz.t(), tile.student_hidden, first=tile.rows.start == 0)
            if tile.rows.stop < problem.kept:
                continue
            if factor is not None:
                total.mul_(factor)
            if weight_grad is not None:
                weight_grad[tile.ids] = total
            else:
                into[tile.ids] += total
    return hidden_sum, weight_grad, bias_sum


def _tiles(problem: Problem, tensors: Tensors, *, teacher: bool) -> Iterator[Tile]:
    """Raw logits, tile after tile in the same memory: all rows of some ids, then of the next."""
    device, (head,), (spec,) = tensors.device, tensors.student, problem.student
    compute = logits_gradient_dtype(spec.compute, problem.logits, device)

    def kept(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensors.kept is None else tensor[tensors.kept]

    student, labels = kept(head.hidden).to(spec.compute).to(compute), kept(tensors.labels)
    if teacher:
        (other_head,), (other_spec,) = tensors.teacher, problem.teacher
        other = kept(other_head.hidden).to(other_spec.compute)
    student_out, teacher_out = (
        logits_buffer(problem.chunk, min(TILE_IDS, problem.vocab_size), problem.logits, device) if wanted else None
        for wanted in (True, teacher)
    )
    for share, start in enumerate(range(0, problem.vocab_size, TILE_IDS)):
        ids = slice(start, min(start + TILE_IDS, problem.vocab_size))
        weight = head.weight[ids].to(spec.compute).to(compute)
        bias = None if head.bias is None else head.bias[ids]
        if teacher:
            teacher_weight = other_head.weight[ids].to(other_spec.compute)
            teacher_bias = None if other_head.bias is None else other_head.bias[ids]
        for rows in problem.slices():
            shape = slice(rows.stop - rows.start), slice(ids.stop - ids.start)
            yield Tile(
                rows=rows,
                ids=ids,
                share=share,
                student_hidden=student[rows],
                student_weight=weight,
                student=project(student[rows], weight, bias, compute, student_out[shape]),
                teacher=project(other[rows], teacher_weight, teacher_bias, other_spec.compute, teacher_out[shape])
                if teacher
                else None,
                labels=None if labels is None else labels[rows],
            )
