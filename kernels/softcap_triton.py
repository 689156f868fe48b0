"""The Triton kernels of a capped summand of the logits: adding it up, and the gradient on its way back."""

import triton
import triton.language as tl

from minillm.kernels.logits_triton import CAPPED, NEG_INF, softcap_slope, to_logits


@triton.jit
def add_softcapped_kernel(
    total,  # (C, V) fp32
    raw,  # (C, V) fp32, may be total
    V, total_stride, raw_stride,
    inner, outer,  # scale / softcap, softcap
    FIRST: tl.constexpr,  # whether total holds nothing yet
    BLOCK: tl.constexpr,
):  # fmt: skip
    """total (+)= softcap(scale * raw): one program takes a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    z = to_logits(tl.load(raw + row * raw_stride + columns, mask=inside), inner, outer, CAPPED)
    total += row * total_stride
    if not FIRST:
        z += tl.load(total + columns, mask=inside)
    tl.store(total + columns, z, mask=inside)


@triton.jit
def softcap_gradient_kernel(
    dz,  # (C, V) fp32
    raw,  # (C, V) fp32, overwritten
    V, dz_stride, raw_stride,
    inner, scale,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """raw = d loss / d raw, from dz = d loss / d softcap(scale * raw)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < V
    raw += row * raw_stride
    x = tl.load(raw + columns, mask=inside)
    gradient = tl.load(dz + row * dz_stride + columns, mask=inside) * softcap_slope(x * inner) * scale
    tl.store(raw + columns, tl.where(x == NEG_INF, 0.0, gradient), mask=inside)
