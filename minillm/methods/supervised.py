"""The common part of the methods on fixed responses: taking examples, and cross-entropy mixed with a divergence."""

from collections.abc import Sequence

from torch import Tensor

from minillm.data.corpus import block_text
from minillm.losses import TokenStats
from minillm.methods.protocol import Item, Term, TrainingData, sequences_of
from minillm.models.batch import TokenSequence, collate
from minillm.teachers.pair import Models
from minillm.teachers.teacher import Teacher, require_teacher


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
    trains: str = "student",
    target: Teacher | None = None,
) -> Term:
    """(1 - ce_ratio) * divergence + ce_ratio * cross-entropy, as the mean over the response tokens of the step.

    `trains` is the model that learns, and `target` the constant one that it learns from, the teacher where none is given.
    Metrics of another model than the student begin with its name.
    """
    batch = collate(sequences_of(items), models.pad_id)
    count = float(len(batch.labels))
    prefix = "" if trains == "student" else f"{trains}_"

    def objective(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:  # (C,)
        metrics = {}
        if ce_ratio < 1.0:
            distance = getattr(stats, divergence)
            metrics[f"{prefix}{divergence}_nats"] = distance.detach()
        if ce_ratio > 0.0:
            metrics[f"{prefix}cross_entropy_nats"] = -stats.student_logprob.detach()
        if ce_ratio == 0.0:
            return distance, metrics
        if ce_ratio == 1.0:
            return -stats.student_logprob, metrics
        return (1 - ce_ratio) * distance - ce_ratio * stats.student_logprob, metrics

    fields = (divergence,) * (ce_ratio < 1.0) + ("student_logprob",) * (ce_ratio > 0.0)
    if ce_ratio == 1.0:
        return Term(name, batch, objective, fields, count, weight, trains=trains)
    if target is None:
        require_teacher(models.teacher, f"the term {name!r}")
        target = models.teacher
    rows = target.rows(batch)
    return Term(name, batch, objective, fields, count, weight, teacher=rows, options=options or {}, trains=trains)


def pretraining_term(blocks: int, data: TrainingData, models: Models, *, weight: float, kd_ratio: float = 0.0) -> Term:
    """weight times the loss on the next blocks of plain text: cross-entropy, mixed with the forward KL by kd_ratio."""
    texts = [block_text(block) for block in data.corpus.take(blocks)]
    return mixed_term(texts, models, divergence="forward_kl", ce_ratio=1 - kd_ratio, name="pretraining", weight=weight)
