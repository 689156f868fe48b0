"""Universal logit distillation (ULD, arXiv 2402.12030): a teacher whose tokenizer is another one than the student's.

    L = 1/T sum_t [ -log q_t(y_t) + distance_coef * sum_i |p_t,(i) - q_t,(i)| ]

T counts the student's response tokens, p_t,(i) and q_t,(i) are the i-th largest probabilities of teacher and student, the
smaller vocabulary filled up with zeros. Each model reads the record by its own chat template and in its own ids, and
position t of the one answer is compared with position t of the other, as far as the shorter one goes.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from minillm.kernels.sorted_distance import linear_sorted_distance
from minillm.losses import LMHead
from minillm.methods.protocol import HeadLoss, Method, Term, TrainingData
from minillm.methods.supervised import cross_entropy
from minillm.methods.text_pairs import PairedText, collate_pairs, take_paired_references
from minillm.models.batch import TokenBatch
from minillm.teachers.pair import Models
from minillm.teachers.teacher import require_ability


class UniversalLogitDistillation(Method):
    """See the module."""

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[PairedText]:
        return take_paired_references(data, self.step_size)

    def foreseeable(self, draw: int) -> bool:
        return True

    def teacher_batch(self, items: Sequence[PairedText], models: Models) -> TokenBatch:
        return collate_pairs(items, models)[1]

    def terms(self, items: Sequence[PairedText], data: TrainingData, models: Models) -> list[Term]:
        require_ability(models.teacher, "logprobs", "the term 'distillation'")
        batch, theirs = collate_pairs(items, models)
        rows, their_rows = common_positions(batch.lengths, theirs.lengths)
        keys = self.config.method
        objective = partial(weighted_distance, weight=keys.distance_coef, top_k=keys.top_k)
        heads = HeadLoss(objective, models.teacher.rows(theirs), {"rows": rows, "their_rows": their_rows})
        count = float(len(batch.labels))
        return [Term("distillation", batch, cross_entropy, ("student_logprob",), count, heads=heads)]


def common_positions(lengths: Sequence[int], others: Sequence[int]) -> tuple[Tensor, Tensor]:  # (M,) int64 each
    """The rows at which both of two answers, a pair after the other, have a token of the same number."""
    ours, theirs = [], []
    start = other_start = 0
    for length, other in zip(lengths, others, strict=True):
        common = torch.arange(min(length, other))
        ours.append(start + common)
        theirs.append(other_start + common)
        start, other_start = start + length, other_start + other
    return torch.cat(ours), torch.cat(theirs)


def weighted_distance(
    hidden: Tensor,  # (N, H_s)
    head: LMHead,
    teacher_hidden: Tensor,  # (M, H_t)
    teacher_head: LMHead,
    *,
    rows: Tensor,  # (C,) int64
    their_rows: Tensor,  # (C,) int64
    weight: float,
    top_k: int | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`weight` times the sum of the distances of rows that stand at one position, and what is reported of them."""
    distance, left_out = linear_sorted_distance(
        hidden[rows], head, teacher_hidden[their_rows], teacher_head, top_k=top_k
    )
    metrics = {"sorted_distance": distance.detach()}
    return weight * distance, metrics if top_k is None else {**metrics, "sorted_distance_left_out": left_out}


METHOD = UniversalLogitDistillation
