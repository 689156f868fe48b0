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
def _exponentials(z):
    """(m, x, e) of a row: its largest logit, z - m, and their exponentials; x is -inf where z is."""
    m = tl.maximum(tl.max(z, 0), LOWEST)
    x = z - m
    return m, x, tl.exp(x)


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
    if Y_S >= 0 or Y_T >= 0:
        is_label = (lanes < width) & (lanes == tl.load(labels + row) - first)
    sums += place + row
    argmaxes_at = argmaxes + place + row if STUDENT_ARGMAX or TEACHER_ARGMAX else argmaxes

    z_s = load_logits(student + row * student_stride, lanes, width, student_inner, student_outer, STUDENT_MODE, True)
    m_s, x_s, e_s = _exponentials(z_s)
    tl.store(sums + M_S * step, m_s)
    tl.store(sums + S_S * step, tl.sum(e_s, 0))
    if X_S >= 0:
        tl.store(sums + X_S * step, tl.sum(tl.where(z_s == NEG_INF, 0.0, e_s * x_s), 0))
    if Y_S >= 0:
        tl.store(sums + Y_S * step, tl.sum(tl.where(is_label, z_s, 0.0), 0))
    if STUDENT_ARGMAX:
        tl.store(argmaxes_at, tl.min(tl.where(z_s == m_s, first + lanes, _NEVER), 0))
    if TEACHER:
        z_t = load_logits(
            teacher + row * teacher_stride, lanes, width, teacher_inner, teacher_outer, TEACHER_MODE, True
        )
        m_t, x_t, e_t = _exponentials(z_t)
        tl.store(sums + M_T * step, m_t)
        tl.store(sums + S_T * step, tl.sum(e_t, 0))
        if X_T >= 0:
            tl.store(sums + X_T * step, tl.sum(tl.where(z_t == NEG_INF, 0.0, e_t * x_t), 0))
        if Y_T >= 0:
            tl.store(sums + Y_T * step, tl.sum(tl.where(is_label, z_t, 0.0), 0))
        if D_S >= 0:
            tl.store(sums + D_S * step, tl.sum(tl.where(z_s == NEG_INF, 0.0, e_s * (x_s - x_t)), 0))
        if D_T >= 0:
            tl.store(sums + D_T * step, tl.sum(tl.where(z_t == NEG_INF, 0.0, e_t * (x_s - x_t)), 0))
        if TEACHER_ARGMAX:
            tl.store(argmaxes_at + step, tl.min(tl.where(z_t == m_t, first + lanes, _NEVER), 0))


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
