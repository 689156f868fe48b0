"""The row operations of a TopK teacher in torch: the tail's softmax and its gradient, in blocks that fit a core's cache."""

import sys

import torch
from torch import Tensor

from minillm.kernels import rows_torch
from minillm.kernels.chunks import logits_buffer
from minillm.kernels.divergences import RowSpec, expectation
from minillm.kernels.rows_torch import Softmax, logits_from_raw, row_blocks
from minillm.kernels.sparse_teacher_rows import OutcomeRows


def tail_statistics(
    student: Tensor,  # (C, V) raw logits, -inf at the k ids; left as they are
    spec: RowSpec,
    *,
    entropy: bool,
    argmax: bool,
) -> dict[str, Tensor]:
    """As `sparse_teacher_rows.Tail` says."""
    parts = []
    for block in row_blocks(student):
        tail = _softmax(student[block], spec)
        empty = tail.largest == -torch.inf
        part = {"tail_max": tail.largest, "tail_log_sum": torch.where(empty, -torch.inf, -tail.top.log())}
        if entropy:
            log_t = tail.log_probabilities(tail.z == -torch.inf)
            part["tail_entropy"] = expectation(tail.probabilities(), log_t).neg_().masked_fill_(empty[:, 0], 0.0)
        if argmax:
            part["tail_argmax"] = tail.z.argmax(1)
        parts.append({name: value.reshape(-1) for name, value in part.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def tail_gradients(
    student: Tensor,  # (C, V) raw logits, -inf at the k ids; their memory is overwritten
    statistics: dict[str, Tensor],  # (C,) each
    whole: Tensor,  # (C,)
    entropy: Tensor | None,  # (C,)
    spec: RowSpec,
    grad_dtype: torch.dtype,
) -> Tensor:
    """As `sparse_teacher_rows.Tail` says."""
    gradient = student if student.dtype == grad_dtype else logits_buffer(*student.shape, grad_dtype, student.device)
    whole = whole[:, None] * (spec.student_scale / spec.temperature)
    if entropy is not None:
        entropy = entropy[:, None] * (spec.student_scale / spec.temperature)
    for block in row_blocks(student):
        tail = _softmax(student[block], spec)
        empty = tail.largest == -torch.inf
        slope = None
        if spec.student_softcap is not None:  # now: the gradient may take the memory of the logits
            slope = (tail.z * (spec.temperature / spec.student_softcap)).square_().neg_().add_(1.0)
            slope.masked_fill_(tail.z == -torch.inf, 0.0)
        factor = whole[block]
        if entropy is not None:
            log_t = tail.log_probabilities(tail.z == -torch.inf)
            inner = log_t.add_(statistics["tail_entropy"][block, None]).mul_(-entropy[block])
            factor = inner.add_(factor).div_(tail.total)
        else:
            factor = factor / tail.total
        t = tail.softmax
        if t.device.type != "cpu" or bool(empty.any()):  # a softmax of nothing is NaN
            t, factor = t.masked_fill_(empty, 0.0), torch.where(empty, 0.0, factor)
        if gradient.dtype == t.dtype and slope is None:
            torch.mul(t, factor, out=gradient[block])
        else:
            dz = t.mul_(factor)
            gradient[block] = dz if slope is None else dz.mul_(slope)
    return gradient


def _softmax(raw: Tensor, spec: RowSpec) -> Softmax:
    return Softmax.of(logits_from_raw(raw, spec.student_scale, spec.student_softcap, spec.temperature))


ROWS = OutcomeRows(rows_torch, sys.modules[__name__])
