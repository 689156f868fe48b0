"""The Triton kernel that turns a tile of both models' logits into the sums of `share_sums`: one program a row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minillm.kernels.logits_triton import LOWEST, NEG_INF, load_logits, transform
from minillm.kernels.share_sums import NEVER, ShareSums

WARPS = 8
_NEVER = tl.constexpr(NEVER)


@triton.jit
def _store_sums(
    sums, argmax, step, z, ids, is_label,
    M: tl.constexpr, S: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, ARGMAX: tl.constexpr,
):  # fmt: skip
    """One model's sums of a row, all but D. Returns x = z - m and e = exp(x); x is -inf where z is."""
    m = tl.maximum(tl.max(z, 0), LOWEST)
    x = z - m
    e = tl.exp(x)
    tl.store(sums + M * step, m)
    tl.store(sums + S * step, tl.sum(e, 0))
    if X >= 0:
        tl.store(sums + X * step, tl.sum(tl.where(z == NEG_INF, 0.0, e * x), 0))
    if Y >= 0:
        tl.store(sums + Y * step, tl.sum(tl.where(is_label, z, 0.0), 0))
    if ARGMAX:
        tl.store(argmax, tl.min(tl.where(z == m, ids, _NEVER), 0))
    return x, e


@triton.jit(do_not_specialize=["first", "step", "place"])  # `width` may be: its alignment is what allows wide loads
def tile_sums_kernel(
    student,  # (C, width) fp32 raw logits
    teacher,  # (C, width) likewise, or None
    labels,  # (C,) int64, or None
    sums,  # (slots, shares, K) fp32
    argmaxes,  # (2, shares, K) int32, or None
    first,  # the tile's first id
    width,
    step,  # shares * K: from slot to slot
    place,  # of the tile's first row in a slot
    student_stride, teacher_stride,
    student_inner, student_outer, teacher_inner, teacher_outer,
    STUDENT_MODE: tl.constexpr, TEACHER_MODE: tl.constexpr,
    STUDENT_ARGMAX: tl.constexpr, TEACHER_ARGMAX: tl.constexpr,
    # slots of `sums`, -1 where not wanted
    M_S: tl.constexpr, S_S: tl.constexpr, X_S: tl.constexpr, D_S: tl.constexpr, Y_S: tl.constexpr,
    M_T: tl.constexpr, S_T: tl.constexpr, X_T: tl.constexpr, D_T: tl.constexpr, Y_T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    TEACHER: tl.constexpr = S_T >= 0
    row = tl.program_id(0).to(tl.int64)
    step = step.to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    is_label = lanes < width
    if Y_S >= 0 or Y_T >= 0:
        is_label &= lanes == tl.load(labels + row) - first
    place += row
    sums += place
    argmax = argmaxes
    if STUDENT_ARGMAX or TEACHER_ARGMAX:
        argmax += place

    z_s = load_logits(student + row * student_stride, lanes, width, student_inner, student_outer, STUDENT_MODE, True)
    x_s, e_s = _store_sums(sums, argmax, step, z_s, first + lanes, is_label, M_S, S_S, X_S, Y_S, STUDENT_ARGMAX)
    if TEACHER:
        if TEACHER_ARGMAX:
            argmax += step
        z_t = load_logits(
            teacher + row * teacher_stride, lanes, width, teacher_inner, teacher_outer, TEACHER_MODE, True
        )
        x_t, e_t = _store_sums(sums, argmax, step, z_t, first + lanes, is_label, M_T, S_T, X_T, Y_T, TEACHER_ARGMAX)
        if D_S >= 0:
            tl.store(sums + D_S * step, tl.sum(tl.where(z_s == NEG_INF, 0.0, e_s * (x_s - x_t)), 0))
        if D_T >= 0:
            tl.store(sums + D_T * step, tl.sum(tl.where(z_t == NEG_INF, 0.0, e_t * (x_s - x_t)), 0))


def tile_sums(
    student: Tensor,  # (C, W) raw logits of W ids, fp32; columns contiguous
    teacher: Tensor | None,  # (C, W)
    labels: Tensor | None,  # (C,) int64, of the whole vocabulary
    sums: ShareSums,  # which the tile's are written to
    *,
    share: int,  # which of the shares the tile's ids are
    rows: slice,  # which of the K rows the tile's are
    first: int,  # the first of its ids
    block: int,  # ids of the widest tile
) -> None:
    shares, row_count = sums.sums.shape[1:]
    with torch.cuda.device_of(student):
        tile_sums_kernel[(student.shape[0],)](
            student,
            teacher,
            labels,
            sums.sums,
            sums.argmaxes,
            first,
            student.shape[1],
            shares * row_count,
            share * row_count + rows.start,
            student.stride(0),
            0 if teacher is None else teacher.stride(0),
            **transform(sums.spec),
            **sums.constants,
            BLOCK=triton.next_power_of_2(block),
            num_warps=WARPS,
        )
