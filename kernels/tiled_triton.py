"""The no-logits engine: both heads' products and the online softmax in one kernel, tile by tile.

Nothing of the size of the vocabulary times the tokens is ever written: for scoring rollouts, for evaluation, and where
memory is tightest. A program takes a tile of rows and a share of the vocabulary; for each tile of ids it multiplies
hidden states and weights of the student, then of the teacher, with fp32 accumulators that stay in registers, and folds
both tiles into the sums of `share_sums`, about the row's running maximum. With a gradient, `tiles` takes its place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from minillm.kernels import share_sums
from minillm.kernels.divergences import RowSpec
from minillm.kernels.head import LMHead
from minillm.kernels.logits_triton import LOWEST, NEG_INF, to_logits, transform
from minillm.kernels.share_sums import SHARED_FIELDS, ShareSums

CONFIGS = {  # by bytes of an input element: rows and ids of a tile, depth of a product's step
    2: dict(BLOCK_M=128, BLOCK_N=64, BLOCK_H=64, num_warps=8, num_stages=3),
    4: dict(BLOCK_M=64, BLOCK_N=64, BLOCK_H=32, num_warps=8, num_stages=2),  # fp32 proper, not on the tensor cores
}
WAVES = 4  # programs a multiprocessor: enough to even out the last ones

# The interpreter computes wrongly in bf16: it gets fp32. Compiled, products stay in the inputs' dtype.
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_NEVER = tl.constexpr(share_sums.NEVER)


@triton.jit
def _tile_logits(
    hidden, weight, bias, row, first, ids, V, H, inner, outer,
    MODE: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """z of a tile of rows and ids, (BLOCK_M, BLOCK_N) fp32; -inf beyond the vocabulary."""
    z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, H, BLOCK_H):
        a = hidden.load([row, start])  # zeros beyond the edges
        b = weight.load([first, start])
        if _INTERPRETED:
            a, b = a.to(tl.float32), b.to(tl.float32)
        z = tl.dot(a, b.T, z, input_precision="ieee")
    if BIAS:
        z += tl.load(bias + ids, mask=ids < V, other=0.0).to(tl.float32)[None, :]
    z = to_logits(z, inner, outer, MODE)
    return tl.where(ids[None, :] < V, z, NEG_INF)


@triton.jit
def _halves(z):
    """The left and the right half of a tile's columns."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _fold(
    z, new, d, shift, ids, m, s, sd, sx, best,
    SIGN: tl.constexpr,  # of the infinity in sd that means an infinite divergence
    SUM_D: tl.constexpr, SUM_X: tl.constexpr, ARGMAX: tl.constexpr,
):  # fmt: skip
    """Some ids more in every row's sums: m the old maximum, new the new one, shift what d loses on the way."""
    drop = new - m
    shrink = tl.exp(-drop)
    x = z - new[:, None]
    e = tl.exp(x)
    if SUM_X:
        sx = tl.where(shrink == 0.0, 0.0, (sx - s * drop) * shrink) + tl.sum(tl.where(z == NEG_INF, 0.0, e * x), 1)
    if SUM_D:
        # what has no weight any more may have overflowed; what a ban has made infinite stays so
        gone = (shrink == 0.0) & (SIGN * sd < float("inf"))
        sd = tl.where(gone, 0.0, (sd - s * shift) * shrink) + tl.sum(tl.where(z == NEG_INF, 0.0, e * d), 1)
    s = s * shrink + tl.sum(e, 1)
    if ARGMAX:
        place = tl.min(tl.where(z == new[:, None], ids[None, :], _NEVER), 1)
        best = tl.where(new > m, place, best)
    return s, sd, sx, best


@triton.jit
def tiled_kernel(
    student_hidden,  # descriptor of (K, H_s)
    student_weight,  # descriptor of (V, H_s)
    student_bias,  # (V,) or None
    teacher_hidden, teacher_weight, teacher_bias,  # likewise, or None
    labels,  # (K,) int64, or None
    sums,  # (slots, shares, K) fp32
    argmaxes,  # (2, shares, K) int32, or None
    K, V, student_H, teacher_H,
    ids_a_share,  # a multiple of BLOCK_N
    student_inner, student_outer, teacher_inner, teacher_outer,
    STUDENT_MODE: tl.constexpr, TEACHER_MODE: tl.constexpr,
    STUDENT_BIAS: tl.constexpr, TEACHER_BIAS: tl.constexpr,
    STUDENT_ARGMAX: tl.constexpr, TEACHER_ARGMAX: tl.constexpr,
    # slots of `sums`, -1 where not wanted
    M_S: tl.constexpr, S_S: tl.constexpr, X_S: tl.constexpr, D_S: tl.constexpr, Y_S: tl.constexpr,
    M_T: tl.constexpr, S_T: tl.constexpr, X_T: tl.constexpr, D_T: tl.constexpr, Y_T: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    TEACHER: tl.constexpr = S_T >= 0
    RATIO: tl.constexpr = D_S >= 0 or D_T >= 0
    share = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    inside = rows < K
    if Y_S >= 0 or Y_T >= 0:
        label = tl.load(labels + rows, mask=inside, other=0).to(tl.int32)
    zeros = tl.zeros((BLOCK_M,), tl.float32)
    never = tl.full((BLOCK_M,), _NEVER, tl.int32)
    m_s, s_s, d_s, x_s, y_s, best_s = zeros + LOWEST, zeros, zeros, zeros, zeros, never
    m_t, s_t, d_t, x_t, y_t, best_t = zeros + LOWEST, zeros, zeros, zeros, zeros, never
    begin = share * ids_a_share
    for first in range(begin, tl.minimum(begin + ids_a_share, V), BLOCK_N):
        ids = first + tl.arange(0, BLOCK_N)
        z_s = _tile_logits(
            student_hidden, student_weight, student_bias, row, first, ids, V, student_H,
            student_inner, student_outer, STUDENT_MODE, STUDENT_BIAS, BLOCK_M, BLOCK_N, BLOCK_H,
        )  # fmt: skip
        if TEACHER:
            z_t = _tile_logits(
                teacher_hidden, teacher_weight, teacher_bias, row, first, ids, V, teacher_H,
                teacher_inner, teacher_outer, TEACHER_MODE, TEACHER_BIAS, BLOCK_M, BLOCK_N, BLOCK_H,
            )  # fmt: skip
        s_0, s_1 = _halves(z_s)  # half the tile at a time: a whole one's temporaries do not fit into the registers
        if TEACHER:
            t_0, t_1 = _halves(z_t)
        for half in tl.static_range(2):
            part = first + half * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            h_s = s_1 if half else s_0
            if TEACHER:
                h_t = t_1 if half else t_0
            if Y_S >= 0:
                y_s += tl.sum(tl.where(part[None, :] == label[:, None], h_s, 0.0), 1)
            if Y_T >= 0:
                y_t += tl.sum(tl.where(part[None, :] == label[:, None], h_t, 0.0), 1)
            new_s = tl.maximum(m_s, tl.max(h_s, 1))
            d, shift, new_t = h_s, zeros, zeros
            if TEACHER:
                new_t = tl.maximum(m_t, tl.max(h_t, 1))
            if RATIO:
                d = (h_s - new_s[:, None]) - (h_t - new_t[:, None])
                shift = (new_s - m_s) - (new_t - m_t)
            s_s, d_s, x_s, best_s = _fold(
                h_s, new_s, d, shift, part, m_s, s_s, d_s, x_s, best_s, 1, D_S >= 0, X_S >= 0, STUDENT_ARGMAX
            )
            m_s = new_s
            if TEACHER:
                s_t, d_t, x_t, best_t = _fold(
                    h_t, new_t, d, shift, part, m_t, s_t, d_t, x_t, best_t, -1, D_T >= 0, X_T >= 0, TEACHER_ARGMAX
                )
                m_t = new_t

    step = tl.num_programs(1).to(tl.int64) * K  # from slot to slot
    at = share.to(tl.int64) * K + rows
    tl.store(sums + M_S * step + at, m_s, mask=inside)
    tl.store(sums + S_S * step + at, s_s, mask=inside)
    if X_S >= 0:
        tl.store(sums + X_S * step + at, x_s, mask=inside)
    if Y_S >= 0:
        tl.store(sums + Y_S * step + at, y_s, mask=inside)
    if STUDENT_ARGMAX:
        tl.store(argmaxes + at, best_s, mask=inside)
    if TEACHER:
        tl.store(sums + M_T * step + at, m_t, mask=inside)
        tl.store(sums + S_T * step + at, s_t, mask=inside)
        if X_T >= 0:
            tl.store(sums + X_T * step + at, x_t, mask=inside)
        if Y_T >= 0:
            tl.store(sums + Y_T * step + at, y_t, mask=inside)
        if TEACHER_ARGMAX:
            tl.store(argmaxes + step + at, best_t, mask=inside)
    if D_S >= 0:
        tl.store(sums + D_S * step + at, d_s, mask=inside)
    if D_T >= 0:
        tl.store(sums + D_T * step + at, d_t, mask=inside)


def tiled_stats(
    student_hidden: Tensor,  # (K, H_s) kept rows, contiguous
    student_head: LMHead,  # weight (V, H_s) of the same dtype, rows may be padded; scale and softcap are those of spec
    teacher_hidden: Tensor | None,  # (K, H_t), where a field needs it
    teacher_head: LMHead | None,
    labels: Tensor | None,  # (K,) int64 in [0, V), where a field needs them
    spec: RowSpec,
) -> dict[str, Tensor]:
    """The statistics that `rows_torch.row_statistics` returns for these rows, (K,) each, without logits.

    Raises ValueError for fields outside SHARED_FIELDS and for inputs in float64.
    """
    refused = [name for name in spec.fields if name not in SHARED_FIELDS]
    if refused:
        raise ValueError(f"backend='tiled' does not offer {', '.join(refused)}; use backend='triton' or 'auto'")
    for tensor in (student_hidden, teacher_hidden):
        if tensor is not None and tensor.dtype.itemsize not in CONFIGS:
            raise ValueError(f"hidden states are {tensor.dtype}; backend='tiled' takes float32, bfloat16 and float16")
    rows, device = student_hidden.shape[0], student_hidden.device
    widest = max(tensor.dtype.itemsize for tensor in (student_hidden, teacher_hidden) if tensor is not None)
    config = CONFIGS[widest]
    vocab_size = student_head.weight.shape[0]
    row_tiles = triton.cdiv(rows, config["BLOCK_M"])
    shares, ids_a_share = _shares(row_tiles, vocab_size, config["BLOCK_N"], device)
    sums = ShareSums(spec, teacher=teacher_hidden is not None, shares=shares, rows=rows, device=device)
    with torch.cuda.device_of(student_hidden):
        tiled_kernel[(row_tiles, shares)](
            **_model("student", student_hidden, student_head, config),
            **_model("teacher", teacher_hidden, teacher_head, config),
            labels=labels,
            sums=sums.sums,
            argmaxes=sums.argmaxes,
            K=rows,
            V=vocab_size,
            ids_a_share=ids_a_share,
            **transform(spec),
            **sums.constants,
            **config,
        )
    return sums.statistics()


def _shares(row_tiles: int, vocab_size: int, block: int, device: torch.device) -> tuple[int, int]:
    """Into how many shares the vocabulary is cut to keep the device busy, and the ids of each."""
    tiles = triton.cdiv(vocab_size, block)
    shares = min(tiles, max(1, triton.cdiv(WAVES * _processors(device), row_tiles)))
    tiles_a_share = triton.cdiv(tiles, shares)
    return triton.cdiv(tiles, tiles_a_share), tiles_a_share * block


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _model(who: str, hidden: Tensor | None, head: LMHead | None, config: dict[str, int]) -> dict[str, object]:
    """The kernel's arguments for one model."""
    if hidden is None:
        return {**dict.fromkeys((f"{who}_hidden", f"{who}_weight", f"{who}_bias")), f"{who}_H": 0} | {
            f"{who.upper()}_BIAS": False
        }
    rows, columns, depth = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_H"]
    return {
        f"{who}_hidden": TensorDescriptor.from_tensor(_aligned(hidden), [rows, depth]),
        f"{who}_weight": TensorDescriptor.from_tensor(_aligned(head.weight), [columns, depth]),
        f"{who}_bias": None if head.bias is None else head.bias.contiguous(),
        f"{who}_H": hidden.shape[1],
        f"{who.upper()}_BIAS": head.bias is not None,
    }


def _aligned(matrix: Tensor) -> Tensor:
    """The matrix, or a copy, as the copy engine takes it: rows that begin at multiples of 16 bytes."""
    if matrix.stride(1) == 1 and matrix.data_ptr() % 16 == 0 and matrix.stride(0) * matrix.itemsize % 16 == 0:
        return matrix
    per_row = 16 // matrix.itemsize
    copy = matrix.new_empty(matrix.shape[0], triton.cdiv(matrix.shape[1], per_row) * per_row)[:, : matrix.shape[1]]
    return copy.copy_(matrix)
