"""The Triton kernels of a capped summand of the logits: adding it up, and the gradient on its way back.

A program takes a block of a row, without a mask where all of the block is in the vocabulary: a mask forbids wide loads.
"""

import triton
import triton.language as tl

from minillm.kernels.logits_triton import CAPPED, NEG_INF, softcap_slope, to_logits


@triton.jit
def _add_block(total, raw, inside, inner, outer, FIRST: tl.constexpr):
    z = to_logits(tl.load(raw, mask=inside), inner, outer, CAPPED)
    if not FIRST:
        z += tl.load(total, mask=inside)
    tl.store(total, z, mask=inside)


@triton.jit
def add_softcapped_kernel(
    total,  # (C, V) fp32
    raw,  # (C, V) fp32, may be total
    V, total_stride, raw_stride,
    inner, outer,  # scale / softcap, softcap
    FIRST: tl.constexpr,  # whether total holds nothing yet
    BLOCK: tl.constexpr,
):  # fmt: skip
    """total (+)= softcap(scale * raw)."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    total += row * total_stride
    raw += row * raw_stride
    if start + BLOCK <= V:
        _add_block(total + columns, raw + columns, None, inner, outer, FIRST)
    else:
        _add_block(total + columns, raw + columns, columns < V, inner, outer, FIRST)


@triton.jit
def _gradient_block(dz, raw, inside, inner, scale):
    x = tl.load(raw, mask=inside)
    gradient = tl.load(dz, mask=inside) * softcap_slope(x * inner) * scale
    tl.store(raw, tl.where(x == NEG_INF, 0.0, gradient), mask=inside)


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
    start = tl.program_id(1) * BLOCK
    columns = start + tl.arange(0, BLOCK)
    dz += row * dz_stride
    raw += row * raw_stride
    if start + BLOCK <= V:
        _gradient_block(dz + columns, raw + columns, None, inner, scale)
    else:
        _gradient_block(dz + columns, raw + columns, columns < V, inner, scale)
