"""Word-level distillation on the references: any divergence of the kernels, mixed with cross-entropy.

The MiniLLM paper's KD baseline is divergence forward_kl with ce_ratio 0.5 (its soft cross-entropy differs from the
forward KL by the teacher's entropy, a constant).
"""

from collections.abc import Sequence

from minillm.methods.protocol import Item, Method, Term, TrainingData
from minillm.methods.supervised import mixed_term, take_references
from minillm.models.batch import TokenSequence
from minillm.teachers.pair import Models


class WordLevelDistillation(Method):
    """L = (1 - ce_ratio) * D(p, q) - ce_ratio * log q(y), mean over response tokens."""

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        return take_references(data, self.step_size)

    def foreseeable(self, draw: int) -> bool:
        return True

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        method = self.config.method
        return [
            mixed_term(
                items,
                models,
                divergence=method.divergence,
                ce_ratio=method.ce_ratio,
                options={"beta": method.beta, "alpha": method.skew},
            )
        ]


METHOD = WordLevelDistillation
