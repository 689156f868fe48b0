"""The twin of minillm.losses.linear_objective and linear_token_stats: the same buffers, and no arithmetic.

kernels/chunks.py says how many rows the device's chunks have. The bytes that full logits would take stand beside them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.kernels.chunks import chunk_rows
from minillm.kernels.rows_torch import BLOCK_BYTES
from minillm.kernels.sorted_distance import BUFFERS, budget
from minillm.losses import LMHead
from minillm.models.standardized_logits import standardized, sums_of_standardized
from minillm.planning.ledger import Ledger

LOGITS = torch.float32
BLOCK_TEMPORARIES = 2  # a model, of a block's size and alive at a time in rows_torch: probabilities, and a product


@dataclass(frozen=True)
class LossShape:
    """The sizes of one call of a fused loss."""

    rows: int  # predictions that count
    vocab_size: int
    models: int  # 1: the student's logits alone; 2: the teacher's as well
    device: torch.device  # where it will run, not where this does
    block_temporaries: int = BLOCK_TEMPORARIES
    chunk_bytes: int | None = None

    @property
    def chunk(self) -> int:
        """Rows whose logits are alive at a time."""
        return chunk_rows(
            self.rows,
            self.vocab_size,
            models=self.models,
            itemsize=LOGITS.itemsize,
            device=self.device,
            chunk_bytes=self.chunk_bytes,
        )

    @property
    def logits_bytes(self) -> int:
        """Bytes of the chunk's logits, and of what the row operations hold beside them."""
        padded = self.vocab_size if self.device.type == "cpu" else -(-self.vocab_size // 16) * 16
        row = padded * LOGITS.itemsize
        total = self.models * self.chunk * row
        if self.device.type == "cpu":
            block = max(1, BLOCK_BYTES // row) * row
            total += self.block_temporaries * self.models * min(block, self.chunk * row)
        return total

    def full_logits_bytes(self, *, gradient: bool) -> int:
        """Return the bytes that log_softmax on full fp32 logits holds: logits and log-probabilities of each model, and
        with `gradient` that of the student's logits."""
        logits = self.rows * self.vocab_size * LOGITS.itemsize
        return logits * (2 * self.models + int(gradient))


def sorting_shape(rows: int, student_ids: int, teacher_ids: int, device: torch.device) -> LossShape:
    """The sizes of one call of linear_sorted_distance, or linear_group_distance, which keeps to the same budget."""
    ids = student_ids + teacher_ids
    return LossShape(rows, ids, BUFFERS, device, block_temporaries=0, chunk_bytes=budget(device))


class LossTwin(torch.autograd.Function):
    """The memory of linear_objective: student hidden states (N, H) and head weight (V, H) -> a scalar.

    A frozen head has no gradient.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, compute: torch.dtype, shape: LossShape, ledger: Ledger) -> Tensor:
        trained = weight.requires_grad
        hidden_sum = torch.zeros_like(hidden)
        weight_sum = torch.zeros_like(weight, dtype=LOGITS) if trained else None
        on_gpu, casts = shape.device.type == "cuda", []
        if on_gpu and weight.dtype != compute:  # once a call
            casts = [torch.empty_like(weight, dtype=compute)]
        logits = hidden.new_empty(shape.logits_bytes, dtype=torch.uint8)
        if on_gpu and compute != LOGITS:  # a chunk's gradient of the hidden states, before it is rounded
            casts.append(hidden.new_empty(min(shape.chunk, len(hidden)), hidden.shape[1], dtype=LOGITS))
        del logits, casts
        ctx.save_for_backward(hidden, weight, hidden_sum, weight_sum)
        ctx.ledger = ledger
        return hidden.new_zeros((), dtype=LOGITS)

    @staticmethod
    def backward(ctx, _):
        hidden, weight, hidden_sum, weight_sum = ctx.saved_tensors
        with ctx.ledger.part("loss buffers"):
            scaled = [
                None if total is None else torch.empty_like(total, dtype=of.dtype)
                for total, of in ((hidden_sum, hidden), (weight_sum, weight))
            ]
        return (*scaled, None, None, None)


def standardized_twin(
    hidden: Tensor,  # (N, H_s)
    head: LMHead,
    teacher_hidden: Tensor,  # (N, H_t)
    teacher_head: LMHead,
    compute: torch.dtype,
    shape: LossShape,
    ledger: Ledger,
) -> Tensor:
    """The memory of a divergence of standardised logits: the real operations, about the twin of linear_objective. A scalar.

    Raises UserError for heads whose logits are not standardised.
    """
    with torch.no_grad():
        target = standardized(teacher_hidden, teacher_head, shape.vocab_size)

    def sums(scaled: Tensor, own: LMHead) -> tuple[Tensor, Tensor]:
        total = LossTwin.apply(scaled, own.weight, compute, shape, ledger)
        return total, torch.zeros_like(total)

    total, _ = sums_of_standardized(hidden, head, shape.vocab_size, sums)
    del target
    return total


def statistics_twin(hidden: Tensor, shape: LossShape) -> None:
    """Allocate what linear_token_stats holds at a time without a gradient, for hidden states (N, H)."""
    hidden.new_empty(shape.logits_bytes, dtype=torch.uint8)
