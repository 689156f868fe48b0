"""The softmax of rows, and what a row's ids add up to: all of them are here, or those of one rank."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.kernels.block_memory import FRESH, BlockMemory


@dataclass
class Softmax:
    """A model's rows: logits z, their largest, and softmax(z), but for a factor close to 1 that its sum gives away.

    Torch's softmax goes over a row once for all of it, where the exponential alone takes longer than that; but it adds
    up a row in few lanes, which costs the last digits of a large vocabulary.
    """

    z: Tensor  # (B, V)
    softmax: Tensor  # (B, V)
    largest: Tensor  # (B, 1)
    total: Tensor  # (B, 1), of softmax
    top: Tensor  # (B, 1), the largest probability: one over sum exp(z - largest)
    memory: BlockMemory = FRESH

    @classmethod
    def of(cls, z: Tensor, memory: BlockMemory = FRESH) -> "Softmax":  # (B, V)
        softmax = torch.softmax(z, 1, out=memory.like(z))
        total = softmax.sum(1, keepdim=True)
        return cls(z, softmax, z.amax(1, keepdim=True), total, softmax.amax(1, keepdim=True) / total, memory)

    def probabilities(self) -> Tensor:  # (B, V)
        return self.softmax.mul_(self.total.reciprocal())

    def logprob(self, labels: Tensor) -> Tensor:  # (B, 1) int64 -> (B, 1)
        return (self.z.gather(1, labels) - self.largest).add_(self.top.log())

    def log_probabilities(self, banned: Tensor | None) -> Tensor:  # (B, V), 0 where banned, NaN where all are
        result = torch.sub(self.z, self.largest, out=self.memory.like(self.z)).add_(self.top.log())
        return result if banned is None else result.masked_fill_(banned & ~self.top.isnan(), 0.0)


class Ids:
    """The ids whose logits are the columns: all of them. `vocabulary_parallel` has those of which a rank holds some."""

    def widest(self, logits: Tensor) -> int:  # (C, V)
        """The number of columns that decides how many rows make a block."""
        return logits.shape[1]

    def softmax(self, z: Tensor, memory: BlockMemory) -> Softmax:  # (B, V)
        return Softmax.of(z, memory)

    def logprob(self, model: Softmax, labels: Tensor) -> Tensor:  # (B, 1) int64 -> (B, 1)
        """log softmax at the label, as a part of a sum over columns."""
        return model.logprob(labels)

    def argmax(self, model: Softmax) -> Tensor:
        """The lowest id with the largest logit, (B,)."""
        return model.z.argmax(1)

    def sums(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:  # (B,) or (B, 1) each
        """Sums over the columns, added up over all ids."""
        return parts

    def add_at_label(self, dz: Tensor, labels: Tensor, value: Tensor) -> None:  # (B, V), (B, 1), (B, 1)
        dz.scatter_add_(1, labels, value)


ALL = Ids()
