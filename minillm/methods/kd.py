"""Word-level distillation on the references: any divergence of the kernels, mixed with cross-entropy.

The MiniLLM paper's KD baseline is divergence forward_kl with ce_ratio 0.5 (its soft cross-entropy differs from the
forward KL by the teacher's entropy, a constant). LLaVA-MoD's dense-to-dense stage (arXiv 2408.15881) is that divergence with
ce_coef 0, its dense-to-sparse stage with ce_coef 1 and a balance loss. Its released code takes the teacher's distribution
where the answer's own tokens stand, so that the prediction of the first one is left out and one beyond the last taken in;
here it is taken where they are predicted, as the cross-entropy is.
"""

from collections.abc import Sequence

from minillm.methods.protocol import Item, Method, Term, TrainingData
from minillm.methods.supervised import mixed_term, take_references
from minillm.models.batch import TokenSequence
from minillm.teachers.pair import Models


class WordLevelDistillation(Method):
    """L = (1 - ce_ratio) * D(p, q) - ce_ratio * log q(y), or D(p, q) - ce_coef * log q(y), mean over response tokens."""

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
                ce_ratio=method.ce_share,
                weight=method.weight,
                options={"beta": method.beta, "alpha": method.skew},
            )
        ]


METHOD = WordLevelDistillation
