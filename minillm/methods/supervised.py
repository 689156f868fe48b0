"""The common part of the methods on fixed responses: taking examples, and cross-entropy mixed with a divergence."""

from collections.abc import Sequence

from torch import Tensor

from minillm.losses import TokenStats
from minillm.methods.protocol import Item, Term, TrainingData, sequences_of
from minillm.models.batch import TokenSequence, collate
from minillm.teachers.pair import Models
from minillm.teachers.teacher import require_teacher


def take_references(data: TrainingData, size: int) -> list[TokenSequence]:
    """The next `size` prompts with their references as the response to imitate."""
    return [example.sequence for example in data.prompts.take(size)]


def cross_entropy(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:  # (C,)
    """-log q(label) a token."""
    return -stats.student_logprob, {"cross_entropy_nats": -stats.student_logprob.detach()}


def mixed_term(
    items: Sequence[Item],
    models: Models,
    *,
    divergence: str,
    ce_ratio: float,
    options: dict[str, float] | None = None,
    name: str = "distillation",
    weight: float = 1.0,
) -> Term:
    """(1 - ce_ratio) * divergence + ce_ratio * cross-entropy, as the mean over the response tokens of the step."""
    batch = collate(sequences_of(items), models.pad_id)
    count = float(len(batch.labels))
    if ce_ratio == 1.0:
        return Term(name, batch, cross_entropy, ("student_logprob",), count, weight)

    def objective(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:  # (C,)
        distance = getattr(stats, divergence)
        metrics = {f"{divergence}_nats": distance.detach()}
        if ce_ratio == 0.0:
            return distance, metrics
        metrics["cross_entropy_nats"] = -stats.student_logprob.detach()
        return (1 - ce_ratio) * distance - ce_ratio * stats.student_logprob, metrics

    fields = (divergence,) if ce_ratio == 0.0 else (divergence, "student_logprob")
    require_teacher(models.teacher, f"the term {name!r}")
    return Term(
        name, batch, objective, fields, count, weight, teacher=models.teacher.rows(batch), options=options or {}
    )


def pretraining_term(blocks: int, data: TrainingData, models: Models, *, weight: float, kd_ratio: float = 0.0) -> Term:
    """weight times the loss on the next blocks of plain text: cross-entropy, mixed with the forward KL by kd_ratio."""
    texts = [TokenSequence(block[:1], block[1:]) for block in data.corpus.take(blocks)]
    return mixed_term(texts, models, divergence="forward_kl", ce_ratio=1 - kd_ratio, name="pretraining", weight=weight)
