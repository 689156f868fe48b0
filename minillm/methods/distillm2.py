"""Contrastive distillation (DistiLLM-2, arXiv 2503.07067): each model's answers have the divergence that suits them.

    L = mean over prompts of  mean_t KL(p || a p + (1 - a) q) on the teacher's answer
                            + w mean_t KL(q || (1 - a) p + a q) on the student's,    a skew, w student_weight

Every answer counts alike, however long it is. The skew KL pulls q up where the teacher writes, the skew reverse KL pushes
it down where the student alone does.

Differences from the released code. It reads both answers from files that were written before a stage; here both models
answer the prompts of each step, the student as it is by then. It takes the student's part of the mixture in the second
divergence for a constant; here the gradient is that of the formula. The paper's adaptive skew and growing weight are
switched off there, and are not offered.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.data.pairs import AnswerPair
from minillm.losses import TokenStats
from minillm.methods.on_policy import sampled_pairs
from minillm.methods.protocol import Method, Term, TrainingData
from minillm.methods.supervised import take_references
from minillm.models.batch import TokenSequence, collate
from minillm.teachers.pair import Models
from minillm.teachers.teacher import require_teacher


class ContrastiveDistillation(Method):
    """See the module."""

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[AnswerPair]:
        return sampled_pairs(take_references(data, self.step_size), data, self.config, draw=draw)

    def terms(self, items: Sequence[AnswerPair], data: TrainingData, models: Models) -> list[Term]:
        keys = self.config.method
        written, own = [pair.chosen for pair in items], [pair.rejected for pair in items]
        return [
            answer_term("teacher_answers", written, models, "skew_forward_kl", keys.skew),
            answer_term("student_answers", own, models, "skew_reverse_kl", keys.skew, weight=keys.student_weight),
        ]


def answer_term(
    name: str, answers: Sequence[TokenSequence], models: Models, divergence: str, skew: float, *, weight: float = 1.0
) -> Term:
    """The mean over answers of a divergence's mean over the tokens of each."""
    require_teacher(models.teacher, f"the term {name!r}")
    batch = collate(answers, models.pad_id)
    share = torch.cat([torch.full((length,), 1.0 / max(length, 1)) for length in batch.lengths])

    def objective(stats: TokenStats, *, share: Tensor) -> tuple[Tensor, dict[str, Tensor]]:  # (C,)
        distance = getattr(stats, divergence)
        return share * distance, {f"{divergence}_nats": distance.detach()}

    return Term(
        name,
        batch,
        objective,
        (divergence,),
        count=float(len(answers)),
        weight=weight,
        inputs={"share": share},
        teacher=models.teacher.rows(batch),
        options={"alpha": skew},
    )


METHOD = ContrastiveDistillation
