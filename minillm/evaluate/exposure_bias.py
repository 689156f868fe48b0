"""Exposure bias as excess accumulated error (Arora et al., arXiv 2204.01171; MiniLLM, arXiv 2306.08543, section 3.3).

    R(l)         = sum over t <= l of E[ KL(p || q) at t ], the prefix sampled from the student q
    l epsilon(l) = the same, the prefix sampled from the teacher p
    ExAccErr(l)  = 100 (R(l) - l epsilon(l)) / (l epsilon(l))

Both sums begin at the first token of the answer, where the two prefixes are the same. The KL is exact, over the whole
vocabulary. An answer that has ended adds nothing more: after its end both models are certain of nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm import UserError


@dataclass(frozen=True)
class AccumulatedError:
    """R and l epsilon at every length: (L,) float64, entry l - 1 for l tokens, in nats."""

    on_student: Tensor  # (L,)
    on_teacher: Tensor  # (L,)

    def excess(self, length: int) -> float:
        """ExAccErr at so many tokens, in per cent; NaN where the teacher's own prefixes give no error at all."""
        accumulated, expected = self.on_student[length - 1].item(), self.on_teacher[length - 1].item()
        return 100.0 * (accumulated - expected) / expected if expected else float("nan")


def accumulated_error(
    on_student: Sequence[Tensor],  # (T,) each: KL(p || q) along an answer of the student
    on_teacher: Sequence[Tensor],  # (T,) each: along an answer of the teacher
    length: int,
) -> AccumulatedError:
    """Means over the answers, accumulated up to `length` tokens. Raises UserError where there is no answer."""
    if not on_student or not on_teacher:
        raise UserError("accumulated_error: no answers; exposure bias needs some of the student and of the teacher")
    return AccumulatedError(_accumulate(on_student, length), _accumulate(on_teacher, length))


def _accumulate(vectors: Sequence[Tensor], length: int) -> Tensor:
    sums = torch.zeros(length, dtype=torch.float64)
    for vector in vectors:
        kept = vector[:length].double()
        sums[: len(kept)] += kept
    return (sums / len(vectors)).cumsum(0)
