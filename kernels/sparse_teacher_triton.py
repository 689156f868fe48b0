"""The row operations of a TopK teacher on a GPU: the Triton kernel of the tail's statistics, and its gradient by the kernel
of a student's row alone."""

import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels import rows_triton
from minillm.kernels.divergences import RowSpec
from minillm.kernels.logits_triton import LOWEST, NEG_INF, load_logits, merge, push, transform
from minillm.kernels.sparse_teacher_rows import OutcomeRows

TAIL_BLOCK, TAIL_WARPS = 1024, 8


@triton.jit(do_not_specialize=["slot_stride"])  # a last, shorter chunk compiles nothing new
def tail_kernel(
    student,  # (C, V) fp32 raw logits, -inf at the k ids
    out,  # (slots, C) fp32: the maximum, the logarithm of the sum over it, the entropy
    argmaxes,  # (C,) int64, or None
    slot_stride,  # elements from a slot of `out` to the next
    V, stride, inner, outer,
    MODE: tl.constexpr, ENTROPY: tl.constexpr, ARGMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program takes one row. Where it has no id the first two are -inf and the entropy is 0."""
    index = tl.program_id(0).to(tl.int64)
    student += index * stride
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32)
    whole = V - V % BLOCK

    # every lane starts at the maximum of the first block, with nothing in its sums
    first = load_logits(student, lanes, V, inner, outer, MODE, True)
    k = tl.max(first, 0)
    m, s, s_d, s_x = zeros + tl.where(k == NEG_INF, LOWEST, k), zeros, zeros, zeros
    best = tl.where(first == k, lanes, V - 1)
    for tail in tl.static_range(2):
        for start in range(whole if tail else 0, V if tail else whole, BLOCK):
            columns = start + lanes
            z = load_logits(student, columns, V, inner, outer, MODE, tail)
            m, s, s_d, s_x, best = push(z, zeros, columns, m, s, s_d, s_x, best, False, ENTROPY, ARGMAX)
    m, s, log_s, _, s_x, best = merge(m, s, s_d, s_x, best, V, False, ENTROPY, ARGMAX)
    nothing = s == 0.0

    out += index
    slot_stride = slot_stride.to(tl.int64)
    tl.store(out, tl.where(nothing, NEG_INF, m))
    tl.store(out + slot_stride, tl.where(nothing, NEG_INF, log_s))
    if ENTROPY:
        tl.store(out + 2 * slot_stride, tl.where(nothing, 0.0, log_s - s_x / s))
    if ARGMAX:
        tl.store(argmaxes + index, best.to(tl.int64))


def tail_statistics(
    student: Tensor,  # (C, V) fp32 raw logits, -inf at the k ids; columns contiguous; left as they are
    spec: RowSpec,
    *,
    entropy: bool,
    argmax: bool,
) -> dict[str, Tensor]:
    """As `sparse_teacher_rows.Tail` says."""
    C, V = student.shape
    names = ("tail_max", "tail_log_sum", *(("tail_entropy",) if entropy else ()))
    out = torch.empty(len(names), C, dtype=torch.float32, device=student.device)
    best = torch.empty(C, dtype=torch.int64, device=student.device) if argmax else None
    how = transform(spec)
    if C:
        with torch.cuda.device_of(student):
            tail_kernel[(C,)](
                student,
                out,
                best,
                out.stride(0),
                V,
                student.stride(0),
                how["student_inner"],
                how["student_outer"],
                MODE=how["STUDENT_MODE"],
                ENTROPY=entropy,
                ARGMAX=argmax,
                BLOCK=TAIL_BLOCK,
                num_warps=TAIL_WARPS,
            )
    result = dict(zip(names, out, strict=True))
    return result | {"tail_argmax": best} if argmax else result


def tail_gradients(
    student: Tensor,  # (C, V) fp32 raw logits, -inf at the k ids; their memory is overwritten
    statistics: dict[str, Tensor],  # (C,) each
    whole: Tensor,  # (C,)
    entropy: Tensor | None,  # (C,)
    spec: RowSpec,
    grad_dtype: torch.dtype,  # fp32, bf16 or fp16
) -> Tensor:
    """As `sparse_teacher_rows.Tail` says."""
    empty = statistics["tail_log_sum"] == -torch.inf  # then any maximum and sum make nothing of it
    found = {f"student_{name}": statistics[f"tail_{name}"].masked_fill(empty, 0.0) for name in ("max", "log_sum")}
    # the gradient of c log t(y) is c (1[j = y] - t_j); of a label that is no column it is -c t_j alone
    coefficients, labels = {"student_logprob": -whole}, torch.full_like(whole, -1, dtype=torch.int64)
    if entropy is not None:
        coefficients["student_entropy"], found["student_entropy"] = entropy, statistics["tail_entropy"]
    return rows_triton.row_gradients(student, None, labels, found, coefficients, spec, grad_dtype)


ROWS = OutcomeRows(rows_triton, sys.modules[__name__])
