"""A checked call: what is computed, on which rows, and its logits chunk by chunk. `arguments.prepare` makes it."""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.kernels.chunks import logits_buffer
from minillm.kernels.divergences import RowSpec
from minillm.kernels.head import HeadGradients, LMHead, project, ready


class Tensors(NamedTuple):
    """Every tensor of a call, flattened: what autograd saves."""

    student_hidden: Tensor  # (N, H_s)
    student_weight: Tensor  # (V_s, H_s), uncut
    student_bias: Tensor | None  # (V_s,)
    teacher_hidden: Tensor | None  # (N, H_t)
    teacher_weight: Tensor | None  # (V, H_t), cut
    teacher_bias: Tensor | None  # (V,)
    labels: Tensor | None  # (N,) int64
    kept: Tensor | None  # (K,) int64 rows; None: all


class Chunk(NamedTuple):
    slice: slice  # of the K kept rows
    rows: Tensor | slice  # of the N rows
    hidden: Tensor  # (C, H_s)
    labels: Tensor | None  # (C,)
    student: Tensor  # (C, V) raw logits
    teacher: Tensor | None  # (C, V)


@dataclass(frozen=True)
class Problem:
    """What is computed and how, without any tensor."""

    spec: RowSpec
    shape: torch.Size  # leading dimensions of the hidden states
    kept: int  # K
    vocab_size: int
    chunk: int  # rows whose logits are alive at a time: all V ids of them, or for tiled TILE_IDS
    student_compute: torch.dtype  # of the student's GEMMs
    teacher_compute: torch.dtype | None
    logits: torch.dtype
    backend: str  # torch | triton | tiled

    @property
    def rows(self) -> ModuleType:
        """The row operations of the backend."""
        name = "rows_torch" if self.backend == "torch" else "rows_triton"
        return importlib.import_module(f"minillm.kernels.{name}")

    def slices(self) -> Iterator[slice]:
        for start in range(0, self.kept, self.chunk):
            yield slice(start, min(start + self.chunk, self.kept))

    def chunks(self, tensors: Tensors, *, sums: HeadGradients | None = None, teacher: bool = True) -> Iterator[Chunk]:
        """Raw logits, chunk after chunk, in the same memory. `sums` may have the student's weight ready already."""
        teacher = teacher and tensors.teacher_hidden is not None
        if self.kept:
            device = tensors.student_hidden.device
            student_out = logits_buffer(self.chunk, self.vocab_size, self.logits, device)
            teacher_out = logits_buffer(self.chunk, self.vocab_size, self.logits, device) if teacher else None
        weight = None if sums is None else sums.weight_value
        if weight is None:
            weight = ready(tensors.student_weight[: self.vocab_size], self.student_compute, self.logits)
        teacher_weight = ready(tensors.teacher_weight, self.teacher_compute, self.logits) if teacher else None
        bias = None if tensors.student_bias is None else tensors.student_bias[: self.vocab_size]
        for part in self.slices():
            rows = part if tensors.kept is None else tensors.kept[part]
            size = part.stop - part.start
            hidden = tensors.student_hidden[rows].to(self.student_compute)
            yield Chunk(
                slice=part,
                rows=rows,
                hidden=hidden,
                labels=None if tensors.labels is None else tensors.labels[rows],
                student=project(hidden, weight, bias, self.student_compute, student_out[:size]),
                teacher=project(
                    tensors.teacher_hidden[rows].to(self.teacher_compute),
                    teacher_weight,
                    tensors.teacher_bias,
                    self.teacher_compute,
                    teacher_out[:size],
                )
                if teacher
                else None,
            )

    def gradients(
        self, tensors: Tensors, needs: tuple[bool, bool, bool], accumulation: torch.dtype | Tensor
    ) -> HeadGradients | None:
        """Sums for the student's hidden states, weight and bias; None where nothing needs a gradient."""
        if not any(needs):
            return None
        return HeadGradients(
            tensors.student_hidden,
            tensors.student_weight,
            tensors.student_bias,
            needs=needs,
            compute=self.student_compute,
            logits=self.logits,
            vocab_size=self.vocab_size,
            accumulation=accumulation,
        )

    def empty_statistics(self, device: torch.device) -> dict[str, Tensor]:
        """What the row operations would return for no rows."""
        empty = {name: torch.int64 if name.endswith("argmax") else self.logits for name in self.spec.fields}
        return {name: torch.empty(0, dtype=dtype, device=device) for name, dtype in empty.items()}

    def tiled_arguments(self, tensors: Tensors) -> tuple:
        """Kept rows, heads and labels as `tiled_triton.tiled_stats` takes them."""

        def kept(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
            if tensor is None:
                return None
            tensor = tensor if tensors.kept is None else tensor[tensors.kept]
            return tensor.to(dtype or tensor.dtype).contiguous()

        def head(weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype | None) -> LMHead | None:
            return None if weight is None else LMHead(weight.to(dtype), bias)

        bias = None if tensors.student_bias is None else tensors.student_bias[: self.vocab_size]
        return (
            kept(tensors.student_hidden, self.student_compute),
            head(tensors.student_weight[: self.vocab_size], bias, self.student_compute),
            kept(tensors.teacher_hidden, self.teacher_compute),
            head(tensors.teacher_weight, tensors.teacher_bias, self.teacher_compute),
            kept(tensors.labels),
        )

    def spread(self, value: Tensor, kept: Tensor | None) -> Tensor:
        """(K,) -> (N,): 0 in ignored rows, -1 for indices."""
        if kept is None:
            return value
        fill = 0.0 if value.is_floating_point() else -1
        return value.new_full((self.shape.numel(),), fill).index_copy_(0, kept, value)
