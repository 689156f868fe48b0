"""The Triton kernel of statistics and gradients in one launch, for coefficients that are known beforehand.

The second pass over a row begins where the first has just been: rows that are short enough are still in the L2 cache.
"""

import triton
import triton.language as tl

from minillm.kernels.row_gradients_triton import gradient_kernel
from minillm.kernels.row_statistics_triton import statistics_kernel


@triton.jit(do_not_specialize=["slot_stride"])  # a last, shorter chunk compiles nothing new
def both_kernel(
    student,  # (C, V) fp32 raw logits
    teacher,  # (C, V) fp32 raw logits, or None
    labels,  # (C,) int64, or None
    gradient,  # (C, V), may lie in the memory of student
    vectors,  # (slots, C) fp32: statistics, to be written, and coefficients
    slot_stride, V, student_stride, teacher_stride, gradient_stride,
    student_inner, student_outer, teacher_inner, teacher_outer, chain, beta, alpha, part_s, part_t,
    STUDENT_MODE: tl.constexpr, TEACHER_MODE: tl.constexpr,
    # the slot of each vector, -1 where there is none; C_x is d loss / d x
    STUDENT_MAX: tl.constexpr, STUDENT_LOG_SUM: tl.constexpr,
    TEACHER_MAX: tl.constexpr, TEACHER_LOG_SUM: tl.constexpr,
    STUDENT_LOGPROB: tl.constexpr, TEACHER_LOGPROB: tl.constexpr,
    REVERSE_KL: tl.constexpr, FORWARD_KL: tl.constexpr,
    STUDENT_ENTROPY: tl.constexpr, TEACHER_ENTROPY: tl.constexpr,
    JSD: tl.constexpr, SKEW_FORWARD_KL: tl.constexpr, SKEW_REVERSE_KL: tl.constexpr, TVD: tl.constexpr,
    MEAN_U_JSD: tl.constexpr, MEAN_U_SKEW_FORWARD_KL: tl.constexpr,
    MEAN_U_SKEW_REVERSE_KL: tl.constexpr,
    INTERPOLATED_CROSS_ENTROPY: tl.constexpr, INTERPOLATED_LOG_SUM: tl.constexpr,
    C_STUDENT_LOGPROB: tl.constexpr, C_REVERSE_KL: tl.constexpr, C_FORWARD_KL: tl.constexpr,
    C_STUDENT_ENTROPY: tl.constexpr, C_JSD: tl.constexpr, C_SKEW_FORWARD_KL: tl.constexpr,
    C_SKEW_REVERSE_KL: tl.constexpr, C_TVD: tl.constexpr, C_INTERPOLATED_CROSS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    statistics_kernel(
        student, teacher, labels, vectors, None,
        slot_stride, V, student_stride, teacher_stride,
        student_inner, student_outer, teacher_inner, teacher_outer, beta, alpha, part_s, part_t,
        STUDENT_MODE, TEACHER_MODE, False, False,
        STUDENT_MAX, STUDENT_LOG_SUM, TEACHER_MAX, TEACHER_LOG_SUM, STUDENT_LOGPROB, TEACHER_LOGPROB,
        REVERSE_KL, FORWARD_KL, STUDENT_ENTROPY, TEACHER_ENTROPY, JSD, SKEW_FORWARD_KL, SKEW_REVERSE_KL, TVD,
        MEAN_U_JSD, MEAN_U_SKEW_FORWARD_KL, MEAN_U_SKEW_REVERSE_KL,
        INTERPOLATED_CROSS_ENTROPY, INTERPOLATED_LOG_SUM, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()  # the row's statistics are in memory for every thread of the program
    gradient_kernel(
        student, teacher, labels, gradient, vectors,
        slot_stride, V, student_stride, teacher_stride, gradient_stride,
        student_inner, student_outer, teacher_inner, teacher_outer, chain, beta, alpha, part_s, part_t,
        STUDENT_MODE, TEACHER_MODE,
        STUDENT_MAX, STUDENT_LOG_SUM, TEACHER_MAX, TEACHER_LOG_SUM, REVERSE_KL, STUDENT_ENTROPY,
        MEAN_U_JSD, MEAN_U_SKEW_FORWARD_KL, MEAN_U_SKEW_REVERSE_KL, INTERPOLATED_LOG_SUM,
        C_STUDENT_LOGPROB, C_REVERSE_KL, C_FORWARD_KL, C_STUDENT_ENTROPY, C_JSD, C_SKEW_FORWARD_KL,
        C_SKEW_REVERSE_KL, C_TVD, C_INTERPOLATED_CROSS_ENTROPY, BLOCK,
    )  # fmt: skip
