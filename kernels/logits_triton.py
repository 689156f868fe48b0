"""The common part of the Triton kernels: raw logits to logits, the log-ratio of two models, and the online softmax.

Every lane of a block keeps its own running maximum m and sums under e = exp(z - m), so that no reduction stands inside
a loop over the vocabulary; one exponential does for both cases of the online softmax, as of exp(z - m_old) and
exp(m_old - z) only the smaller is needed.
"""

import triton
import triton.language as tl

from minillm.kernels import divergences
from minillm.kernels.divergences import RowSpec

AS_IT_IS, SCALED, CAPPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # how raw logits become logits
NEG_INF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that differences from it are numbers
FAR = tl.constexpr(divergences.FAR)


def transform(spec: RowSpec) -> dict[str, float | int]:
    """The way from raw logits to logits, as the kernels take it."""
    result: dict[str, float | int] = {}
    for who, scale, softcap in (
        ("student", spec.student_scale, spec.student_softcap),
        ("teacher", spec.teacher_scale, spec.teacher_softcap),
    ):
        if softcap is not None:
            mode, inner, outer = CAPPED.value, scale / softcap, softcap / spec.temperature
        else:
            mode, inner, outer = SCALED.value, 0.0, scale / spec.temperature
            if outer == 1.0:
                mode = AS_IT_IS.value
        result |= {f"{who}_inner": inner, f"{who}_outer": outer, f"{who.upper()}_MODE": mode}
    return result


@triton.jit
def _tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    square = x * x  # near 0 that difference would lose its digits
    near = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(tl.abs(x) < 0.25, x * near, tl.where(x < 0, -far, far))


@triton.jit
def softcap_slope(x):
    """1 - tanh(x)^2 without cancellation; 0 at an infinite x."""
    e = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def to_logits(raw, inner, outer, MODE: tl.constexpr):
    """softcap(scale * raw) / temperature; -inf stays -inf."""
    if MODE == SCALED:
        z = raw * outer
    elif MODE == CAPPED:
        z = tl.where(raw == NEG_INF, NEG_INF, _tanh(raw * inner) * outer)
    else:
        z = raw
    return z


@triton.jit
def load_logits(row, columns, V, inner, outer, MODE: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        raw = tl.load(row + columns, mask=columns < V, other=NEG_INF)
    else:
        raw = tl.load(row + columns)
    return to_logits(raw, inner, outer, MODE)


@triton.jit
def log_mixture(r, weight):
    """(log m - log p, log m - log q) of m = weight p + (1 - weight) q, as in `divergences.log_mixture`."""
    share = tl.where(r > 0, 1.0 - weight, weight)
    log_m = tl.log(share + (1.0 - share) * tl.exp(-tl.abs(r)))
    return log_m + tl.maximum(r, 0.0), log_m + tl.maximum(-r, 0.0)


@triton.jit
def log_ratio(z_s, z_t, r):
    """r with its infinite entries replaced as `divergences` says."""
    no_s = z_s == NEG_INF
    no_t = z_t == NEG_INF
    return tl.where(no_s, tl.where(no_t, 0.0, -FAR), tl.where(no_t, FAR, r))


@triton.jit
def interpolated(x_s, x_t, part_s, part_t):
    """part_s x_s + part_t x_t, of which a part of 0 bans nothing."""
    return tl.where(part_s == 0.0, 0.0, part_s * x_s) + tl.where(part_t == 0.0, 0.0, part_t * x_t)


@triton.jit
def push(
    z, d, columns, m, s, sd, sx, best,
    SUM_D: tl.constexpr, SUM_X: tl.constexpr, ARGMAX: tl.constexpr,
    FROM_NOTHING: tl.constexpr = False,  # lanes may begin with ids of no weight, whose sums of d may overflow
):  # fmt: skip
    """One block more in every lane: m the maximum of z, s = sum e, sd = sum e d, sx = sum e (z - m), e = exp(z - m)."""
    larger = z > m
    gap = z - m
    e = tl.exp(-tl.abs(gap))
    shrink = tl.where(larger, e, 1.0)
    e = tl.where(larger, 1.0, e)
    if SUM_X:
        down = tl.where(larger, gap, 0.0)
        x = tl.where(larger | (z == NEG_INF), 0.0, gap)
        sx = tl.where(shrink == 0.0, 0.0, (sx - s * down) * shrink) + e * x  # s * down may be infinite
    s = s * shrink + e
    if SUM_D:
        sd = sd * shrink
        if FROM_NOTHING:
            sd = tl.where(shrink == 0.0, 0.0, sd)
        sd += e * d
    if ARGMAX:
        best = tl.where(larger, columns, best)
    m = tl.where(larger, z, m)
    return m, s, sd, sx, best


@triton.jit
def merge(m, s, sd, sx, best, V, SUM_D: tl.constexpr, SUM_X: tl.constexpr, ARGMAX: tl.constexpr):
    """The lanes' maxima and sums as the row's."""
    top = tl.max(m, 0)
    weight = tl.exp(m - top)
    if SUM_X:
        sx = tl.sum(tl.where(weight == 0.0, 0.0, (sx + s * (m - top)) * weight), 0)
    else:
        sx = 0.0
    if SUM_D:
        sd = tl.sum(tl.where(weight == 0.0, 0.0, sd * weight), 0)
    else:
        sd = 0.0
    s = tl.sum(s * weight, 0)
    if ARGMAX:
        best = tl.min(tl.where(m == top, best, V - 1), 0)
    else:
        best = 0
    log_s = tl.log(s) + tl.where(s == 0.0, float("nan"), 0.0)  # no id at all: NaN
    return top, s, log_s, sd, sx, best
