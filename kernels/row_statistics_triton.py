"""The Triton kernel of the row statistics: one program takes one row of both models, in one pass.

With k_s, k_t the maxima of the row's first block, or where those lie far below them the row's own, and d = (z_s - k_s) - (z_t - k_t),

    c = (lse_s - k_s) - (lse_t - k_t)        reverse_kl = E_q[d] - c        forward_kl = c - E_p[d]

which keeps its digits whatever the logits' offset, and is exactly 0 for equal logits. The interpolated target is a third
softmax in the same pass, of z = (1 - t) (z_s - k_s) + t (z_t - k_t). Divergences from a mixture need normalised
probabilities and read the row once more.
"""

import triton
import triton.language as tl

from minillm.kernels.logits_triton import (
    LOWEST,
    NEG_INF,
    interpolated,
    load_logits,
    log_mixture,
    log_ratio,
    merge,
    push,
    to_logits,
)

FAR_BELOW = tl.constexpr(64.0)  # differences from a reference that far away would lose six bits


@triton.jit(do_not_specialize=["slot_stride"])  # a last, shorter chunk compiles nothing new
def statistics_kernel(
    student,  # (C, V) fp32 raw logits
    teacher,  # (C, V) fp32 raw logits, or None
    labels,  # (C,) int64, or None
    out,  # (slots, C) fp32
    argmaxes,  # (2, C) int64: student's, teacher's; or None
    slot_stride,  # elements from a slot of `out` to the next
    V, student_stride, teacher_stride,
    student_inner, student_outer, teacher_inner, teacher_outer, beta, alpha,
    part_s, part_t,  # 1 - t and t of the interpolated logits
    STUDENT_MODE: tl.constexpr, TEACHER_MODE: tl.constexpr,
    STUDENT_ARGMAX: tl.constexpr, TEACHER_ARGMAX: tl.constexpr,
    # the slot of each statistic in `out`, -1 where it is not wanted
    STUDENT_MAX: tl.constexpr, STUDENT_LOG_SUM: tl.constexpr,
    TEACHER_MAX: tl.constexpr, TEACHER_LOG_SUM: tl.constexpr,
    STUDENT_LOGPROB: tl.constexpr, TEACHER_LOGPROB: tl.constexpr,
    REVERSE_KL: tl.constexpr, FORWARD_KL: tl.constexpr,
    STUDENT_ENTROPY: tl.constexpr, TEACHER_ENTROPY: tl.constexpr,
    JSD: tl.constexpr, SKEW_FORWARD_KL: tl.constexpr, SKEW_REVERSE_KL: tl.constexpr, TVD: tl.constexpr,
    MEAN_U_JSD: tl.constexpr, MEAN_U_SKEW_FORWARD_KL: tl.constexpr,
    MEAN_U_SKEW_REVERSE_KL: tl.constexpr,
    INTERPOLATED_CROSS_ENTROPY: tl.constexpr, INTERPOLATED_LOG_SUM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    TEACHER: tl.constexpr = TEACHER_MAX >= 0
    RATIO: tl.constexpr = REVERSE_KL >= 0 or FORWARD_KL >= 0
    TARGET: tl.constexpr = INTERPOLATED_CROSS_ENTROPY >= 0
    SECOND: tl.constexpr = JSD >= 0 or SKEW_FORWARD_KL >= 0 or SKEW_REVERSE_KL >= 0 or TVD >= 0
    index = tl.program_id(0).to(tl.int64)
    student += index * student_stride
    lanes = tl.arange(0, BLOCK)
    zeros = tl.zeros((BLOCK,), tl.float32)
    whole = V - V % BLOCK

    # every lane starts at the maximum of the first block, with nothing in its sums
    first = load_logits(student, lanes, V, student_inner, student_outer, STUDENT_MODE, True)
    k_s = tl.max(first, 0)
    m_s, s, s_d, s_x = zeros + tl.where(k_s == NEG_INF, LOWEST, k_s), zeros, zeros, zeros
    best_s = tl.where(first == k_s, lanes, V - 1)
    k_s = tl.where(k_s == NEG_INF, 0.0, k_s)  # all of it is banned: nothing to go by
    k_t = 0.0
    m_t, t, t_d, t_x, best_t = zeros, zeros, zeros, zeros, lanes
    if TEACHER:
        teacher += index * teacher_stride
        first = load_logits(teacher, lanes, V, teacher_inner, teacher_outer, TEACHER_MODE, True)
        k_t = tl.max(first, 0)
        m_t = zeros + tl.where(k_t == NEG_INF, LOWEST, k_t)
        best_t = tl.where(first == k_t, lanes, V - 1)
        k_t = tl.where(k_t == NEG_INF, 0.0, k_t)
    d, z_t = zeros, zeros
    m_i, i, i_d = zeros + LOWEST, zeros, zeros
    infinite = tl.zeros((BLOCK,), tl.int32)  # bit 0: the reverse KL is, bit 1: the forward KL, 2: the cross-entropy

    stop = tl.full((), V, tl.int32)
    for attempt in range(2 if RATIO or TARGET else 1):
        # whole blocks, then what is left: a mask in the main loop would forbid wide loads
        for tail in tl.static_range(2):
            for start in range(whole if tail else 0, tl.minimum(stop, V if tail else whole), BLOCK):
                columns = start + lanes
                z_s = load_logits(student, columns, V, student_inner, student_outer, STUDENT_MODE, tail)
                if TEACHER:
                    z_t = load_logits(teacher, columns, V, teacher_inner, teacher_outer, TEACHER_MODE, tail)
                if RATIO:
                    no_s, no_t = z_s == NEG_INF, z_t == NEG_INF
                    d = tl.where(no_s | no_t, 0.0, (z_s - k_s) - (z_t - k_t))
                    infinite |= tl.where(no_s == no_t, 0, tl.where(no_t, 1, 2))
                m_s, s, s_d, s_x, best_s = push(
                    z_s, d, columns, m_s, s, s_d, s_x, best_s, REVERSE_KL >= 0, STUDENT_ENTROPY >= 0, STUDENT_ARGMAX
                )
                if TEACHER:
                    m_t, t, t_d, t_x, best_t = push(
                        z_t, d, columns, m_t, t, t_d, t_x, best_t, FORWARD_KL >= 0, TEACHER_ENTROPY >= 0, TEACHER_ARGMAX
                    )
                if TARGET:
                    x_s = z_s - k_s
                    z_i = interpolated(x_s, z_t - k_t, part_s, part_t)
                    m_i, i, i_d, _, _ = push(
                        z_i,
                        tl.where(z_s == NEG_INF, 0.0, x_s),
                        columns,
                        m_i,
                        i,
                        i_d,
                        zeros,
                        lanes,
                        True,
                        False,
                        False,
                        True,
                    )
                    forever = (part_s == 0.0) & (z_s == NEG_INF) & (z_t > NEG_INF)
                    infinite |= tl.where(forever, 4, 0)
        if RATIO or TARGET:
            # A first block far below the rest, masked by some finite number say, is nothing to measure d from: once
            # more, from the row's own maxima. The lanes' maxima and argmaxes stay; the sums begin again.
            top_s, top_t = tl.max(m_s, 0), tl.max(m_t, 0)
            far = (attempt == 0) & ((top_s - k_s > FAR_BELOW) | (top_t - k_t > FAR_BELOW))
            stop = tl.where(far, V, 0)
            k_s = tl.where(far & (top_s > LOWEST), top_s, k_s)
            k_t = tl.where(far & (top_t > LOWEST), top_t, k_t)
            s, s_d, s_x = tl.where(far, 0.0, s), tl.where(far, 0.0, s_d), tl.where(far, 0.0, s_x)
            t, t_d, t_x = tl.where(far, 0.0, t), tl.where(far, 0.0, t_d), tl.where(far, 0.0, t_x)
            if TARGET:  # its maxima are measured from the references
                m_i, i, i_d = tl.where(far, LOWEST, m_i), tl.where(far, 0.0, i), tl.where(far, 0.0, i_d)

    out += index
    slot_stride = slot_stride.to(tl.int64)
    m_s, s, log_s, s_d, s_x, best_s = merge(
        m_s, s, s_d, s_x, best_s, V, REVERSE_KL >= 0, STUDENT_ENTROPY >= 0, STUDENT_ARGMAX
    )
    tl.store(out + STUDENT_MAX * slot_stride, m_s)
    tl.store(out + STUDENT_LOG_SUM * slot_stride, log_s)
    if STUDENT_LOGPROB >= 0 or TEACHER_LOGPROB >= 0:
        label = tl.load(labels + index)
    if STUDENT_LOGPROB >= 0:
        z_y = to_logits(tl.load(student + label), student_inner, student_outer, STUDENT_MODE)
        tl.store(out + STUDENT_LOGPROB * slot_stride, (z_y - m_s) - log_s)
    if STUDENT_ENTROPY >= 0:
        tl.store(out + STUDENT_ENTROPY * slot_stride, log_s - s_x / s)
    if STUDENT_ARGMAX:
        tl.store(argmaxes + index, best_s.to(tl.int64))
    if TEACHER:
        m_t, t, log_t, t_d, t_x, best_t = merge(
            m_t, t, t_d, t_x, best_t, V, FORWARD_KL >= 0, TEACHER_ENTROPY >= 0, TEACHER_ARGMAX
        )
        tl.store(out + TEACHER_MAX * slot_stride, m_t)
        tl.store(out + TEACHER_LOG_SUM * slot_stride, log_t)
        if TEACHER_LOGPROB >= 0:
            z_y = to_logits(tl.load(teacher + label), teacher_inner, teacher_outer, TEACHER_MODE)
            tl.store(out + TEACHER_LOGPROB * slot_stride, (z_y - m_t) - log_t)
        if TEACHER_ENTROPY >= 0:
            tl.store(out + TEACHER_ENTROPY * slot_stride, log_t - t_x / t)
        if TEACHER_ARGMAX:
            tl.store(argmaxes + slot_stride + index, best_t.to(tl.int64))
        c = ((m_s - k_s) + log_s) - ((m_t - k_t) + log_t)
        if REVERSE_KL >= 0:  # infinity is added, so that a NaN stays a NaN
            forever = tl.where(tl.max(infinite & 1, 0) > 0, float("inf"), 0.0)
            tl.store(out + REVERSE_KL * slot_stride, s_d / s - c + forever)
        if FORWARD_KL >= 0:
            forever = tl.where(tl.max(infinite & 2, 0) > 0, float("inf"), 0.0)
            tl.store(out + FORWARD_KL * slot_stride, c - t_d / t + forever)
        if TARGET:
            m_i, i, log_i, i_d, _, _ = merge(m_i, i, i_d, zeros, lanes, V, True, False, False)
            forever = tl.where(tl.max(infinite & 4, 0) > 0, float("inf"), 0.0)
            tl.store(out + INTERPOLATED_CROSS_ENTROPY * slot_stride, (m_s - k_s) + log_s - i_d / i + forever)
            # of (1 - t) (z_s - m_s) + t (z_t - m_t), which the gradient can see
            moved = interpolated(m_s - k_s, m_t - k_t, part_s, part_t)
            tl.store(out + INTERPOLATED_LOG_SUM * slot_stride, (m_i - moved) + log_i)

    if SECOND:
        jsd, jsd_u, tvd = zeros, zeros, zeros
        skew_f, skew_f_u, skew_r, skew_r_u = zeros, zeros, zeros, zeros
        for tail in tl.static_range(2):
            for start in range(whole if tail else 0, V if tail else whole, BLOCK):
                z_s = load_logits(student, start + lanes, V, student_inner, student_outer, STUDENT_MODE, tail)
                z_t = load_logits(teacher, start + lanes, V, teacher_inner, teacher_outer, TEACHER_MODE, tail)
                x_s, x_t = z_s - m_s, z_t - m_t
                q, p = tl.exp(x_s - log_s), tl.exp(x_t - log_t)
                r = log_ratio(z_s, z_t, (x_s - x_t) - (log_s - log_t))
                if JSD >= 0:
                    over_p, over_q = log_mixture(r, beta)
                    jsd -= beta * p * over_p + (1.0 - beta) * q * over_q
                    jsd_u -= (1.0 - beta) * q * over_q
                if SKEW_FORWARD_KL >= 0:
                    over_p, over_q = log_mixture(r, alpha)
                    skew_f -= p * over_p
                    skew_f_u -= (1.0 - alpha) * q * tl.exp(-over_p)
                if SKEW_REVERSE_KL >= 0:
                    over_p, over_q = log_mixture(r, 1.0 - alpha)
                    skew_r -= q * over_q
                    skew_r_u -= q * (over_q + alpha * tl.exp(-over_q))
                if TVD >= 0:
                    tvd += 0.5 * tl.abs(q - p)
        broken = (log_s - log_s) + (log_t - log_t)  # NaN where a model's row holds NaN or nothing, else 0
        if JSD >= 0:
            tl.store(out + JSD * slot_stride, tl.sum(jsd, 0) + broken)
            tl.store(out + MEAN_U_JSD * slot_stride, tl.sum(jsd_u, 0) + broken)
        if SKEW_FORWARD_KL >= 0:
            tl.store(out + SKEW_FORWARD_KL * slot_stride, tl.sum(skew_f, 0) + broken)
            tl.store(out + MEAN_U_SKEW_FORWARD_KL * slot_stride, tl.sum(skew_f_u, 0) + broken)
        if SKEW_REVERSE_KL >= 0:
            tl.store(out + SKEW_REVERSE_KL * slot_stride, tl.sum(skew_r, 0) + broken)
            tl.store(out + MEAN_U_SKEW_REVERSE_KL * slot_stride, tl.sum(skew_r_u, 0) + broken)
        if TVD >= 0:
            tl.store(out + TVD * slot_stride, tl.sum(tvd, 0) + broken)
