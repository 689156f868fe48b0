"""A model's logits and the gradients that come back: of its one head, or of the heads whose logits it adds up.

Of one head the raw logits h W^T + b are left as they are: scale and softcap are the row operations'. Where there are
more, every summand is scaled and capped before it is added, z = sum_i softcap_i(scale_i (h_i W_i^T + b_i)), and the
row operations see a model without scale and softcap.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.kernels.chunks import logits_buffer
from minillm.kernels.head import HeadGradients, add_projection, project, ready


class HeadTensors(NamedTuple):
    """The tensors of one head."""

    hidden: Tensor  # (N, H)
    weight: Tensor  # (V', H), more ids than are used perhaps
    bias: Tensor | None  # (V',)


@dataclass(frozen=True)
class HeadSpec:
    """The products of one head."""

    compute: torch.dtype  # of its GEMMs
    scale: float = 1.0  # of a summand; of a single head the RowSpec has them
    softcap: float | None = None
    graded: bool = False  # whether a tensor of the summand requires grad

    @property
    def keeps_raw(self) -> bool:
        """True where the gradient reads the summand's raw logits."""
        return self.softcap is not None and self.graded


def buffers(specs: tuple[HeadSpec, ...]) -> int:
    """The number of (C, V) buffers of logits that ModelLogits holds."""
    first, *others = _order(specs)
    passing = any(specs[index].softcap is not None and not specs[index].keeps_raw for index in others)
    return 1 + sum(spec.keeps_raw for spec in specs) + passing


def _order(specs: tuple[HeadSpec, ...]) -> list[int]:
    """The order in which summands are added: the first may be capped where it stands."""
    return sorted(range(len(specs)), key=lambda index: specs[index].softcap is None or specs[index].keeps_raw)


class ModelLogits:
    """Logits of one model, a chunk of rows after the other in the same memory: raw, or the sum over its heads."""

    def __init__(
        self,
        heads: tuple[HeadTensors, ...],
        specs: tuple[HeadSpec, ...],
        weights: Sequence[Tensor | None],  # (V, H_i) each, where it is ready already
        *,
        chunk: int,
        vocab_size: int,
        dtype: torch.dtype,
        operations: ModuleType,  # of the backend on rows
    ):
        self.heads, self.specs, self.operations = heads, specs, operations
        device = heads[0].hidden.device

        def buffer() -> Tensor:
            return logits_buffer(chunk, vocab_size, dtype, device)

        self.out = buffer()
        self.raw = [buffer() if spec.keeps_raw else None for spec in specs]
        self.passing = buffer() if buffers(specs) > 1 + sum(spec.keeps_raw for spec in specs) else None
        self.weights = [
            ready(head.weight[:vocab_size], spec.compute, dtype) if weight is None else weight
            for head, spec, weight in zip(heads, specs, weights, strict=True)
        ]
        self.biases = [None if head.bias is None else head.bias[:vocab_size] for head in heads]
        self.hidden: tuple[Tensor, ...] = ()  # (C, H_i) each: the chunk's, in the dtypes of the GEMMs

    def of(self, rows: Tensor | slice, size: int) -> Tensor:  # C row indices, C -> (C, V)
        """The logits of some rows. Valid until the next call."""
        self.hidden = tuple(
            head.hidden[rows].to(spec.compute) for head, spec in zip(self.heads, self.specs, strict=True)
        )
        out = self.out[:size]
        if len(self.heads) == 1:
            return project(*self._operands(0), out)
        for place, index in enumerate(_order(self.specs)):
            self._add(index, out, size, first=place == 0)
        return out

    def _operands(self, index: int) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
        return self.hidden[index], self.weights[index], self.biases[index], self.specs[index].compute

    def _add(self, index: int, out: Tensor, size: int, *, first: bool) -> None:
        spec = self.specs[index]
        if spec.softcap is not None:
            raw = self.raw[index] if spec.keeps_raw else out if first else self.passing
            raw = project(*self._operands(index), raw[:size])
            self.operations.add_softcapped(out, raw, spec.scale, spec.softcap, first=first)
        elif first:
            project(*self._operands(index), out)
            if spec.scale != 1.0:
                out.mul_(spec.scale)
        else:
            add_projection(*self._operands(index), out, spec.scale)

    def summand_gradient(self, index: int, dz: Tensor, *, last: bool) -> Tensor:  # (C, V) -> (C, V)
        """d loss / d raw logits of a head from that of the logits of the last call; `last`: dz is of no further use."""
        spec = self.specs[index]
        if spec.softcap is not None:
            return self.operations.softcap_gradient(dz, self.raw[index][: dz.shape[0]], spec.scale, spec.softcap)
        if spec.scale != 1.0:
            return dz.mul_(spec.scale) if last else dz * spec.scale
        return dz


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
        self.specs, self.logits = specs, logits
        self.heads: list[HeadGradients | None] = []  # None for what is frozen
        for index, (head, spec) in enumerate(zip(heads, specs, strict=True)):
            mine = tuple(needs[3 * index : 3 * index + 3])
            sums = HeadGradients(
                *head,
                needs=mine,
                compute=spec.compute,
                logits=logits,
                vocab_size=vocab_size,
                accumulation=accumulation[index],
            )
            self.heads.append(sums if any(mine) else None)

    @property
    def weight_values(self) -> list[Tensor | None]:
        """Every head's weight as `project` reads it, where it has been made ready."""
        return [None if head is None else head.weight_value for head in self.heads]

    @property
    def dz_dtype(self) -> torch.dtype:
        """The dtype in which `add` wants the gradient of the logits."""
        wanted = {head.dz_dtype for head in self.heads if head is not None}
        changed = any(
            head is not None and (spec.softcap is not None or spec.scale != 1.0)
            for head, spec in zip(self.heads, self.specs, strict=True)
        )
        return self.logits if changed or len(wanted) > 1 else wanted.pop()

    def add(self, dz: Tensor, logits: ModelLogits, rows: Tensor | slice) -> None:  # (C, V) of dz_dtype, -, C of N rows
        """Adds the gradient of the logits that `logits` gave last, those of `rows`. May overwrite them and dz."""
        graded = [index for index, head in enumerate(self.heads) if head is not None]
        for index in graded:
            head, mine = self.heads[index], dz
            if len(self.heads) > 1:
                mine = _cast(logits.summand_gradient(index, dz, last=index == graded[-1]), head.dz_dtype)
            head.add(mine, logits.hidden[index], rows)

    def scale(self, factor: float | Tensor) -> None:
        """Multiplies every sum, none of which goes into a tensor of the caller's."""
        for total in self.totals:
            if total is not None:
                total.mul_(factor)

    @property
    def totals(self) -> tuple[Tensor | None, ...]:
        """The sums, three for each head; None where none is needed."""
        return tuple(
            total
            for head in self.heads
            for total in ((None, None, None) if head is None else (head.hidden, head.weight, head.bias))
        )


def _cast(dz: Tensor, dtype: torch.dtype) -> Tensor:  # (C, V)
    """In rows as long as the products want them."""
    return dz if dz.dtype == dtype else logits_buffer(*dz.shape, dtype, dz.device).copy_(dz)
