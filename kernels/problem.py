"""A checked call: what is computed, on which rows, and its logits chunk by chunk. `arguments.prepare` makes it."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from minillm.kernels.divergences import RowSpec
from minillm.kernels.head import LMHead
from minillm.kernels.model_logits import HeadSpec, HeadTensors, ModelLogits, StudentGradients
from minillm.kernels.sparse_teacher import SparseRows
from minillm.kernels.sparse_teacher_rows import OutcomeRows
from minillm.kernels.vocabulary_parallel import VocabularyShard


class Tensors(NamedTuple):
    """Every tensor of a call, flattened over tokens: a tree, whose leaves autograd saves. The student's come first."""

    student: tuple[HeadTensors, ...]  # one head, or those whose logits are added up
    teacher: tuple[HeadTensors, ...] | SparseRows | None  # constants
    labels: Tensor | None  # (N,) int64
    kept: Tensor | None  # (K,) int64 rows; None: all

    @property
    def leaves(self) -> tuple[Tensor | None, ...]:
        """The tensors that may require grad: hidden states, weight and bias of every head of the student."""
        return tuple(tensor for head in self.student for tensor in head)

    @property
    def rows(self) -> int:
        """N."""
        return self.student[0].hidden.shape[0]

    @property
    def device(self) -> torch.device:
        return self.student[0].hidden.device


class Chunk(NamedTuple):
    slice: slice  # of the K kept rows
    rows: Tensor | slice  # of the N rows
    labels: Tensor | None  # (C,)
    student: Tensor  # (C, V) raw logits
    teacher: Tensor | SparseRows | None  # (C, V); of a TopK the chunk's rows
    student_logits: ModelLogits  # where the student's come from


@dataclass(frozen=True)
class Problem:
    """The computation that is asked for, without any tensor."""

    spec: RowSpec
    shape: torch.Size  # leading dimensions of the hidden states
    kept: int  # K
    vocab_size: int
    chunk: int  # rows whose logits are alive at a time: all V ids of them, or for tiled TILE_IDS
    student: tuple[HeadSpec, ...]
    teacher: tuple[HeadSpec, ...] | None
    logits: torch.dtype
    backend: str  # torch | triton | tiled
    sparse_teacher: bool = False  # the teacher is a TopK
    shard: VocabularyShard | None = None  # the ids are those of this rank: vocab_size of them, labels by their columns

    @property
    def rows(self) -> ModuleType | OutcomeRows | VocabularyShard:
        """The row operations of the backend."""
        if self.shard is not None:
            return self.shard
        return self._module("sparse_teacher").ROWS if self.sparse_teacher else self._module("rows")

    def _module(self, name: str) -> ModuleType:
        return importlib.import_module(f"minillm.kernels.{name}_{'torch' if self.backend == 'torch' else 'triton'}")

    def slices(self) -> Iterator[slice]:
        """The kept rows of every chunk."""
        for start in range(0, self.kept, self.chunk):
            yield slice(start, min(start + self.chunk, self.kept))

    def chunks(
        self, tensors: Tensors, *, sums: StudentGradients | None = None, teacher: bool = True
    ) -> Iterator[Chunk]:
        """Raw logits, chunk after chunk, in the same memory. `sums` may have the student's weights ready already."""
        if not self.kept:
            return
        student_logits = self._logits(tensors.student, self.student, None if sums is None else sums.weight_values)
        teacher_logits = self._logits(tensors.teacher, self.teacher) if teacher and self.teacher else None
        for part in self.slices():
            rows = part if tensors.kept is None else tensors.kept[part]
            size = part.stop - part.start
            if self.sparse_teacher:  # statistics of the student alone are in terms of its outcomes too
                theirs = tensors.teacher.of(rows)
            else:
                theirs = None if teacher_logits is None else teacher_logits.of(rows, size)
            yield Chunk(
                slice=part,
                rows=rows,
                labels=None if tensors.labels is None else tensors.labels[rows],
                student=student_logits.of(rows, size),
                teacher=theirs,
                student_logits=student_logits,
            )

    def _logits(
        self,
        heads: tuple[HeadTensors, ...],
        specs: tuple[HeadSpec, ...],
        weights: Sequence[Tensor | None] | None = None,
    ) -> ModelLogits:
        return ModelLogits(
            heads,
            specs,
            weights or [None] * len(heads),
            chunk=self.chunk,
            vocab_size=self.vocab_size,
            dtype=self.logits,
            operations=self._module("rows"),
        )

    def gradients(
        self, tensors: Tensors, needs: Sequence[bool], accumulation: Sequence[torch.dtype | Tensor]
    ) -> StudentGradients | None:
        """Sums for the student's leaves; None where nothing needs a gradient."""
        if not any(needs):
            return None
        return StudentGradients(
            tensors.student,
            self.student,
            needs=needs,
            logits=self.logits,
            vocab_size=self.vocab_size,
            accumulation=accumulation,
        )

    def empty_statistics(self, device: torch.device) -> dict[str, Tensor]:
        """The results of the row operations for no rows."""
        empty = {name: torch.int64 if name.endswith("argmax") else self.logits for name in self.spec.fields}
        return {name: torch.empty(0, dtype=dtype, device=device) for name, dtype in empty.items()}

    def tiled_arguments(self, tensors: Tensors) -> tuple:
        """Kept rows, heads and labels as `tiled_triton.tiled_stats` takes them."""

        def kept(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
            if tensor is None:
                return None
            tensor = tensor if tensors.kept is None else tensor[tensors.kept]
            return tensor.to(dtype or tensor.dtype).contiguous()

        def model(heads: tuple[HeadTensors, ...] | None, specs: tuple[HeadSpec, ...] | None) -> tuple:
            if heads is None:
                return None, None
            (head,), (spec,) = heads, specs
            bias = None if head.bias is None else head.bias[: self.vocab_size]
            return kept(head.hidden, spec.compute), LMHead(head.weight[: self.vocab_size].to(spec.compute), bias)

        return (
            *model(tensors.student, self.student),
            *model(tensors.teacher, self.teacher),
            kept(tensors.labels),
        )

    def spread(self, value: Tensor, kept: Tensor | None) -> Tensor:
        """(K,) -> (N,): 0 in ignored rows, -1 for indices."""
        if kept is None:
            return value
        fill = 0.0 if value.is_floating_point() else -1
        return value.new_full((self.shape.numel(),), fill).index_copy_(0, kept, value)
