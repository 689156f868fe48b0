"""A model's logits and the gradients that come back: of its one head, or of the heads whose logits it adds up.

Of one head the raw logits h W^T + b are left as they are: scale and softcap are the row operations'. Where there are
more, every summand is scaled and capped before it is added, z = sum_i softcap_i(scale_i (h_i W_i^T + b_i)), and the
row operations see a model without scale and softcap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.kernels.chunks import logits_buffer
from minillm.kernels.head import HeadGradients, project, ready


class HeadTensors(NamedTuple):
    """The tensors of one head."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V', H), more ids than are used perhaps
    bias: Tensor | None  # (V',)


@dataclass(frozen=True)
class HeadSpec:
    """How one head is multiplied out."""

    compute: torch.dtype  # of its GEMMs


class ModelLogits:
    """Raw logits of one model, a chunk of rows after the other in the same memory."""

    def __init__(
        self,
        heads: tuple[HeadTensors, ...],
        specs: tuple[HeadSpec, ...],
        sums: "StudentGradients | None",  # which may have weights ready already
        *,
        chunk: int,
        vocab_size: int,
        dtype: torch.dtype,
    ):
        self.heads, self.specs = heads, specs
        self.out = logits_buffer(chunk, vocab_size, dtype, heads[0].hidden.device)
        self.weights = [
            ready(head.weight[:vocab_size], spec.compute, dtype) if value is None else value
            for head, spec, value in zip(
                heads, specs, [None] * len(heads) if sums is None else sums.weight_values, strict=True
            )
        ]
        self.biases = [None if head.bias is None else head.bias[:vocab_size] for head in heads]
        self.hidden: tuple[Tensor, ...] = ()  # (C, H_i) each: the chunk's, in the dtypes of the GEMMs

    def of(self, rows: Tensor | slice, size: int) -> Tensor:  # C row indices, C -> (C, V)
        """The logits of some rows. Valid until the next call."""
        self.hidden = tuple(
            head.hidden[rows].to(spec.compute) for head, spec in zip(self.heads, self.specs, strict=True)
        )
        return project(self.hidden[0], self.weights[0], self.biases[0], self.specs[0].compute, self.out[:size])


class StudentGradients:
    """Sums d loss / d (hidden, weight, bias) of the student's heads over chunks."""

    def __init__(
        self,
        heads: tuple[HeadTensors, ...],
        specs: tuple[HeadSpec, ...],
        *,
        needs: Sequence[bool],  # of hidden, weight and bias of every head
        logits: torch.dtype,
        vocab_size: int,
        accumulation: Sequence[torch.dtype | Tensor],  # one for each head
    ):
        self.heads = [
            HeadGradients(
                *head,
                needs=tuple(needs[3 * index : 3 * index + 3]),
                compute=spec.compute,
                logits=logits,
                vocab_size=vocab_size,
                accumulation=accumulation[index],
            )
            for index, (head, spec) in enumerate(zip(heads, specs, strict=True))
        ]

    @property
    def weight_values(self) -> list[Tensor | None]:
        """Every head's weight as `project` reads it, where it has been made ready."""
        return [head.weight_value for head in self.heads]

    @property
    def dz_dtype(self) -> torch.dtype:
        """The dtype in which `add` wants the gradient of the logits."""
        return self.heads[0].dz_dtype

    def add(self, dz: Tensor, logits: ModelLogits, rows: Tensor | slice) -> None:  # (C, V) of dz_dtype, -, C of N rows
        """Adds the gradient of the logits that `logits` gave last, those of `rows`."""
        self.heads[0].add(dz, logits.hidden[0], rows)

    @property
    def totals(self) -> tuple[Tensor | None, ...]:
        """The sums, three for each head; None where none is needed."""
        return tuple(total for head in self.heads for total in (head.hidden, head.weight, head.bias))
