"""Dropping ignored rows before any GEMM, and cutting the rest into chunks by a byte budget."""

import torch
from torch import Tensor

from minillm.kernels.sparse_teacher import RowChecks

CPU_BUDGET = 60 * 2**20  # bytes of logits of both models: from 32 MiB each on, malloc has new pages in every call
DEVICE_BUDGET = 1280 * 2**20
DEVICE_ROWS = (512, 4096)  # fewer starve the GEMMs, more save nothing
DEVICE_MULTIPLE = 128
TILE_IDS, TILE_BYTES = 2048, 32 * 2**20  # ids of a tile of the tiled engine's gradient, and its logits: both fit in L2


def keep_rows(
    labels: Tensor,  # (N,) int64
    ignore_index: int,
    vocab_size: int,
    kept: int | None,
    checks: RowChecks | None = None,
) -> tuple[Tensor | None, int]:
    """The ascending indices (K,) of the rows whose label is not ignore_index (None: all of them), and K.

    One host synchronisation, for the count, the range check and the teacher's checks together; none where the caller
    passes `kept`, whose labels and ids are then not checked on a GPU.
    """
    mask = labels != ignore_index
    if kept is None or labels.device.type == "cpu":
        outside = mask & ((labels < 0) | (labels >= vocab_size))
        counts = mask.sum(), outside.sum(), *(() if checks is None else checks.counts(mask))
        count, wrong, *broken = torch.stack(counts).tolist()
        if wrong:
            raise ValueError(
                f"labels: {wrong} of {count} kept labels are outside [0, {vocab_size}), the vocabulary in use; "
                f"set them to ignore_index={ignore_index} to leave their tokens out"
            )
        if checks is not None:
            checks.report(broken, count)
        if kept is not None and kept != count:
            raise ValueError(f"kept is {kept}, but {count} labels differ from ignore_index={ignore_index}")
        kept = count
    if kept == labels.numel():
        return None, kept
    # kept rows first, in order; nonzero() would synchronise once more
    return torch.argsort((~mask).to(torch.uint8), stable=True)[:kept], kept


def chunk_rows(
    rows: int,
    vocab_size: int,
    *,
    models: int,  # buffers of logits alive at a time
    itemsize: int,
    device: torch.device,
    chunk_bytes: int | None,
) -> int:
    """Rows of a chunk: what fits into chunk_bytes of logits, evened out so that the last chunk is no remnant."""
    row_bytes = models * itemsize * vocab_size
    if device.type == "cpu":
        most = max(1, (chunk_bytes or CPU_BUDGET) // row_bytes)
        multiple = 1
    else:
        most = max(1, (chunk_bytes or DEVICE_BUDGET) // row_bytes)
        if chunk_bytes is None:
            most = min(max(most, DEVICE_ROWS[0]), DEVICE_ROWS[1])
        multiple = DEVICE_MULTIPLE if most >= DEVICE_MULTIPLE else 1
        most -= most % multiple
    chunks = max(1, -(-rows // most))
    even = -(-rows // chunks)
    return max(1, -(-even // multiple) * multiple)


def logits_buffer(rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for (rows, vocab_size) logits. On a GPU the leading dimension is a multiple of 16, for the fast GEMMs."""
    padded = vocab_size if device.type == "cpu" else -(-vocab_size // 16) * 16
    return torch.empty(rows, padded, dtype=dtype, device=device)[:, :vocab_size]
