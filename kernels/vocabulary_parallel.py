"""Heads of which every rank of a process group holds some rows: the losses of the whole vocabulary, without its weight.

Ranks hold consecutive ids in the order of their ranks, of student and teacher the same, and see the same tokens. A block of
rows has its logits at this rank's ids alone, and what a row's ids add up to comes from all ranks: the largest logit and
the sum of exponentials of each model, then the sums that statistics are made of. So every rank gets the statistics of
the whole vocabulary, the same to the last bit, the gradient of its own rows of the weight, and its part of that of the
hidden states, which `Replicated` adds up. Products, chunks, objectives and the second pass are those of one rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.kernels import rows_torch
from minillm.kernels.block_memory import BlockMemory
from minillm.kernels.divergences import RowSpec
from minillm.kernels.softmax_torch import Ids, Softmax

NEVER = 2**62  # the argmax of a rank that does not have it


@dataclass(frozen=True)
class VocabularyShard(Ids):
    """This rank's ids, first <= id < first + size, of those of a group; and the row operations on them."""

    group: Any  # dist.ProcessGroup
    first: int
    size: int
    largest: int  # the size of the largest shard
    total: int  # ids of all ranks

    @classmethod
    def of(cls, group: Any, rows: int, vocab_size: int | None, tokens: int, device: torch.device) -> "VocabularyShard":
        """The shard of a rank whose heads have so many `rows`. One collective; the same ValueError on all ranks."""
        mine = torch.tensor([rows, tokens], dtype=torch.int64, device=device)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(found, mine, group=group)
        sizes, numbers = torch.stack(found).T.tolist()
        if len(set(numbers)) > 1:
            raise ValueError(
                f"process_group: its ranks have {', '.join(map(str, numbers))} tokens; pass the same tokens on all of them"
            )
        if vocab_size is not None and not 1 <= vocab_size <= sum(sizes):
            raise ValueError(
                f"vocab_size={vocab_size} must lie between 1 and {sum(sizes)}, the rows of all ranks' heads"
            )
        total, first, used = vocab_size or sum(sizes), 0, []
        for size in sizes:
            used.append((first, max(0, min(size, total - first))))
            first += size
        empty = [rank for rank, (_, size) in enumerate(used) if not size]
        if empty:
            raise ValueError(
                f"process_group: rank {empty[0]} holds none of the first {total} ids; cut the vocabulary so that each rank has "
                "some, or pass a larger vocab_size"
            )
        first, size = used[dist.get_rank(group)]
        return cls(group, first, size, max(size for _, size in used), total)

    def local(self, labels: Tensor | None) -> Tensor | None:  # (N,) int64
        """Labels as numbers of this rank's columns; outside of them where another rank has the label."""
        return None if labels is None else labels - self.first

    # what Ids of one rank are

    def widest(self, logits: Tensor) -> int:
        return self.largest

    def softmax(self, z: Tensor, memory: BlockMemory) -> Softmax:
        largest = self._reduce(z.amax(1, keepdim=True), dist.ReduceOp.MAX)
        e = torch.sub(z, largest, out=memory.like(z)).exp_()
        total = self._reduce(e.sum(1, keepdim=True), dist.ReduceOp.SUM)
        return Softmax(z, e, largest, total, total.reciprocal(), memory)

    def logprob(self, model: Softmax, labels: Tensor) -> Tensor:
        here, columns = self._here(labels)
        return torch.where(here, model.logprob(columns), 0.0)

    def argmax(self, model: Softmax) -> Tensor:
        best, column = model.z.max(1, keepdim=True)
        mine = torch.where(best == model.largest, column + self.first, NEVER)
        found = self._reduce(mine, dist.ReduceOp.MIN)[:, 0]
        return found.masked_fill_(found == NEVER, 0)

    def sums(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        if not parts:
            return parts
        total = self._reduce(torch.stack(list(parts.values())), dist.ReduceOp.SUM)
        return dict(zip(parts, total, strict=True))

    def add_at_label(self, dz: Tensor, labels: Tensor, value: Tensor) -> None:
        here, columns = self._here(labels)
        dz.scatter_add_(1, columns, torch.where(here, value, 0.0))

    def _here(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        here = (labels >= 0) & (labels < self.size)
        return here, torch.where(here, labels, 0)

    def _reduce(self, value: Tensor, how: dist.ReduceOp) -> Tensor:
        value = value.contiguous()
        dist.all_reduce(value, how, group=self.group)
        return value

    # the row operations, as those of `rows_torch`

    def row_statistics(self, student: Tensor, teacher: Tensor | None, labels: Tensor | None, spec: RowSpec):
        return rows_torch.row_statistics(student, teacher, labels, spec, self)

    def row_gradients(self, student, teacher, labels, statistics, coefficients, spec, grad_dtype) -> Tensor:
        return rows_torch.row_gradients(student, teacher, labels, statistics, coefficients, spec, grad_dtype, self)

    def row_loss_gradients(self, student, teacher, labels, spec, differentiate, grad_dtype) -> Tensor | None:
        return rows_torch.row_loss_gradients(student, teacher, labels, spec, differentiate, grad_dtype, self)


class Replicated(torch.autograd.Function):
    """Hidden states that all ranks of a group have, whose gradient is the sum of what each of them finds."""

    @staticmethod
    def forward(ctx, hidden: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
