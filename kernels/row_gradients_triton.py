"""The Triton kernel of the row gradients: one program takes one row, in one pass over the logits (two for tvd).

In half precision a row of gradients takes the first half of its own row of fp32 logits: blocks go up, and all of a
block is read before any of it is written.
"""

import triton
import triton.language as tl

from minillm.kernels.logits_triton import (
    CAPPED,
    NEG_INF,
    interpolated,
    load_logits,
    log_mixture,
    log_ratio,
    softcap_slope,
    to_logits,
)


@triton.jit
def times(c, value):
    """c * value, and 0 where c is 0 whatever the value."""
    return tl.where(c == 0.0, 0.0, c * value)


@triton.jit(do_not_specialize=["slot_stride"])  # a last, shorter chunk compiles nothing new
def gradient_kernel(
    student,  # (C, V) fp32 raw logits
    teacher,  # (C, V) fp32 raw logits, or None
    labels,  # (C,) int64, or None
    gradient,  # (C, V), may lie in the memory of student: the module says how
    vectors,  # (slots, C) fp32: statistics and coefficients
    slot_stride,  # elements from a vector to the next
    V, student_stride, teacher_stride, gradient_stride,
    student_inner, student_outer, teacher_inner, teacher_outer, chain, beta, alpha, part_s, part_t,
    STUDENT_MODE: tl.constexpr, TEACHER_MODE: tl.constexpr,
    # the slot of each vector, -1 where there is none; C_x is d loss / d x
    STUDENT_MAX: tl.constexpr, STUDENT_LOG_SUM: tl.constexpr,
    TEACHER_MAX: tl.constexpr, TEACHER_LOG_SUM: tl.constexpr, REVERSE_KL: tl.constexpr, STUDENT_ENTROPY: tl.constexpr,
    MEAN_U_JSD: tl.constexpr, MEAN_U_SKEW_FORWARD_KL: tl.constexpr,
    MEAN_U_SKEW_REVERSE_KL: tl.constexpr, INTERPOLATED_LOG_SUM: tl.constexpr,
    C_STUDENT_LOGPROB: tl.constexpr, C_REVERSE_KL: tl.constexpr, C_FORWARD_KL: tl.constexpr,
    C_STUDENT_ENTROPY: tl.constexpr, C_JSD: tl.constexpr, C_SKEW_FORWARD_KL: tl.constexpr,
    C_SKEW_REVERSE_KL: tl.constexpr, C_TVD: tl.constexpr, C_INTERPOLATED_CROSS_ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    TEACHER: tl.constexpr = TEACHER_MAX >= 0
    index = tl.program_id(0).to(tl.int64)
    student += index * student_stride
    gradient += index * gradient_stride
    vectors += index
    slot_stride = slot_stride.to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    whole = V - V % BLOCK

    # the maximum and the rest of the log-sum-exp apart: together they lose the digits of small log-ratios
    m_s, log_s = tl.load(vectors + STUDENT_MAX * slot_stride), tl.load(vectors + STUDENT_LOG_SUM * slot_stride)
    constant = 0.0  # minus the mean of sum_f c_f u_f under q
    if TEACHER:
        teacher += index * teacher_stride
        m_t, log_t = tl.load(vectors + TEACHER_MAX * slot_stride), tl.load(vectors + TEACHER_LOG_SUM * slot_stride)
    if C_STUDENT_LOGPROB >= 0:
        label = tl.load(labels + index)
        c_logprob = tl.load(vectors + C_STUDENT_LOGPROB * slot_stride)
        constant -= c_logprob
    if C_REVERSE_KL >= 0:
        c_reverse = tl.load(vectors + C_REVERSE_KL * slot_stride)
        constant -= times(c_reverse, tl.load(vectors + REVERSE_KL * slot_stride))
    if C_FORWARD_KL >= 0:
        c_forward = tl.load(vectors + C_FORWARD_KL * slot_stride)
        constant += c_forward
    if C_STUDENT_ENTROPY >= 0:
        c_entropy = tl.load(vectors + C_STUDENT_ENTROPY * slot_stride)
        constant -= times(c_entropy, tl.load(vectors + STUDENT_ENTROPY * slot_stride))
    if C_JSD >= 0:
        c_jsd = tl.load(vectors + C_JSD * slot_stride)
        constant -= times(c_jsd, tl.load(vectors + MEAN_U_JSD * slot_stride))
    if C_SKEW_FORWARD_KL >= 0:
        c_skew_f = tl.load(vectors + C_SKEW_FORWARD_KL * slot_stride)
        constant -= times(c_skew_f, tl.load(vectors + MEAN_U_SKEW_FORWARD_KL * slot_stride))
    if C_SKEW_REVERSE_KL >= 0:
        c_skew_r = tl.load(vectors + C_SKEW_REVERSE_KL * slot_stride)
        constant -= times(c_skew_r, tl.load(vectors + MEAN_U_SKEW_REVERSE_KL * slot_stride))
    if C_INTERPOLATED_CROSS_ENTROPY >= 0:
        c_target = tl.load(vectors + C_INTERPOLATED_CROSS_ENTROPY * slot_stride)
        log_i = tl.load(vectors + INTERPOLATED_LOG_SUM * slot_stride)
        constant += c_target
    if C_TVD >= 0:
        # of the very signs used below: where q is almost 1, a mean that rounds otherwise would be off by 1
        c_tvd = tl.load(vectors + C_TVD * slot_stride)
        signs = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            columns = start + lanes
            z_s = load_logits(student, columns, V, student_inner, student_outer, STUDENT_MODE, True)
            z_t = load_logits(teacher, columns, V, teacher_inner, teacher_outer, TEACHER_MODE, True)
            x_s, x_t = z_s - m_s, z_t - m_t
            log_q = x_s - log_s
            r = log_ratio(z_s, z_t, (x_s - x_t) - (log_s - log_t))
            signs += tl.exp(log_q) * tl.where(r > 0, 0.5, tl.where(r < 0, -0.5, 0.0))
        constant -= times(c_tvd, tl.sum(signs, 0))

    for tail in tl.static_range(2):
        for start in range(whole if tail else 0, V if tail else whole, BLOCK):
            columns = start + lanes
            if tail:
                raw = tl.load(student + columns, mask=columns < V, other=NEG_INF)
            else:
                raw = tl.load(student + columns)
            z_s = to_logits(raw, student_inner, student_outer, STUDENT_MODE)
            x_s = z_s - m_s
            log_q = x_s - log_s
            q = tl.exp(log_q)
            u = tl.zeros((BLOCK,), tl.float32) + constant
            if TEACHER:
                z_t = load_logits(teacher, columns, V, teacher_inner, teacher_outer, TEACHER_MODE, tail)
                x_t = z_t - m_t
                log_p = x_t - log_t
                r = log_ratio(z_s, z_t, (x_s - x_t) - (log_s - log_t))
            if C_REVERSE_KL >= 0:
                u += times(c_reverse, r)
            if C_STUDENT_ENTROPY >= 0:
                u -= times(c_entropy, log_q)
            if C_JSD >= 0:
                over_p, over_q = log_mixture(r, beta)
                u -= times(c_jsd, (1.0 - beta) * over_q)
            if C_SKEW_FORWARD_KL >= 0:
                over_p, over_q = log_mixture(r, alpha)
                u -= times(c_skew_f, (1.0 - alpha) * tl.exp(-over_p))
            if C_SKEW_REVERSE_KL >= 0:
                over_p, over_q = log_mixture(r, 1.0 - alpha)
                u -= times(c_skew_r, over_q + alpha * tl.exp(-over_q))
            if C_TVD >= 0:
                u += times(c_tvd, tl.where(r > 0, 0.5, tl.where(r < 0, -0.5, 0.0)))
            dz = tl.where(q == 0.0, 0.0, q * u)
            if C_FORWARD_KL >= 0:
                dz -= times(c_forward, tl.exp(log_p))
            if C_INTERPOLATED_CROSS_ENTROPY >= 0:
                dz -= times(c_target, tl.exp(interpolated(x_s, x_t, part_s, part_t) - log_i))
            if C_STUDENT_LOGPROB >= 0:
                dz += tl.where(columns == label, c_logprob, 0.0)
            if STUDENT_MODE == CAPPED:
                dz = tl.where(raw == NEG_INF, 0.0, dz * softcap_slope(raw * student_inner))
            dz = (dz * chain).to(gradient.dtype.element_ty)
            tl.debug_barrier()  # all of the block is read before any of it is overwritten
            if tail:
                tl.store(gradient + columns, dz, mask=columns < V)
            else:
                tl.store(gradient + columns, dz)
