"""Cross-model control (arXiv 2410.17599): a small delta model learns what to add to the logits of a frozen template.

    L = CE(data.prompts) - forget_coef * CE(data.forget),    CE = mean over response tokens of -log softmax(z_T + z_D)_y

z_T are the template's logits (the teacher's) and z_D the delta's (the student's), whose gradient is softmax(z_T + z_D) less
the one-hot label. With forget_coef the first set is the one to retain. The paper writes log_softmax(z_T) + z_D: it differs
from z_T + z_D by a constant in every row, which changes neither loss nor gradient, as do its two other forms.

The negative cross-entropy has no lower bound: a stage of it is to be short, as the published 20 epochs of 400 answers are.

Differences from the released code. Its retained answers are drawn at random beside every answer to forget; here both sets
are gone through in orders of their own, as many of each in a step. It normalises the template's logits in bf16, ours are
fp32. What is evaluated in a stage is the sum, at alpha = 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from minillm.losses import TokenStats
from minillm.methods.protocol import Method, Term, TrainingData
from minillm.methods.supervised import cross_entropy, take_references
from minillm.models.batch import TokenSequence, collate
from minillm.teachers.pair import Models
from minillm.teachers.teacher import require_ability


@dataclass(frozen=True)
class ControlItem:
    """An answer to imitate, and one to forget where there is a set of those."""

    key: int
    sequence: TokenSequence
    forget: TokenSequence | None

    @property
    def width(self) -> int:
        """Tokens of the longer text."""
        return max(self.sequence.width, 0 if self.forget is None else self.forget.width)


class CrossModelControl(Method):
    """See the module."""

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[ControlItem]:
        imitated = take_references(data, self.step_size)
        if not self.needs.forget:
            return [ControlItem(one.key, one, None) for one in imitated]
        forgotten = [example.sequence for example in data.forget.take(self.step_size)]
        return [ControlItem(one.key, one, other) for one, other in zip(imitated, forgotten, strict=True)]

    def terms(self, items: Sequence[ControlItem], data: TrainingData, models: Models) -> list[Term]:
        terms = [summed_term("control", [item.sequence for item in items], models, cross_entropy)]
        if self.needs.forget:
            forgotten = [item.forget for item in items]
            weight = self.config.method.forget_coef
            terms.append(summed_term("forget", forgotten, models, likelihood, weight=weight))
        return terms


def likelihood(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:  # (C,)
    """log q(label) a token: the negative of its cross-entropy."""
    return stats.student_logprob, {"forget_cross_entropy_nats": -stats.student_logprob.detach()}


def summed_term(
    name: str, sequences: Sequence[TokenSequence], models: Models, objective, *, weight: float = 1.0
) -> Term:
    """The mean over response tokens of an objective of the log-probabilities of template and delta together."""
    require_ability(models.teacher, "hidden", f"the term {name!r}")
    batch = collate(sequences, models.pad_id)
    template = models.teacher.rows(batch)
    count = float(len(batch.labels))
    return Term(name, batch, objective, ("student_logprob",), count, weight, template=template)


METHOD = CrossModelControl
