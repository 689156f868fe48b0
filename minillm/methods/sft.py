"""Supervised fine-tuning: cross-entropy on the reference responses, token mean."""

from collections.abc import Sequence

from minillm.methods.protocol import Item, Method, Term, TrainingData
from minillm.methods.supervised import mixed_term, take_references
from minillm.models.batch import TokenSequence
from minillm.teachers.pair import Models


class SupervisedFineTuning(Method):
    """L = - mean over response tokens of log q(y_t | y_<t, x)."""

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        return take_references(data, self.step_size)

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        return [mixed_term(items, models, divergence="forward_kl", ce_ratio=1.0, name="supervised")]


METHOD = SupervisedFineTuning
