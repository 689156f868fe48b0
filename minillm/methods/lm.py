"""Pre-training on plain text, alone or mixed with the teacher's distribution at every token (word-level distillation)."""

from collections.abc import Sequence

from minillm.data.corpus import block_text
from minillm.methods.protocol import Item, Method, Term, TrainingData
from minillm.methods.supervised import mixed_term
from minillm.models.batch import TokenSequence
from minillm.teachers.pair import Models


class LanguageModelling(Method):
    """L = kd_ratio * KL(p || q) - (1 - kd_ratio) * log q(x_t), mean over all tokens of the blocks but each one's first.

    With kd_ratio 0.5 this has the gradient of the word-level baseline of MiniPLM (arXiv 2410.17215), which mixes the
    cross-entropy on the text with that on the teacher; the two differ by the teacher's entropy, a constant. The released
    code takes the mean of each sequence before that of the batch: the same for blocks, which are of one length.
    """

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        numbered = data.corpus.take_numbered(self.step_size)
        return [block_text(block, place) for place, block in numbered]

    def foreseeable(self, draw: int) -> bool:
        return True

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        ce_ratio = 1.0 - self.config.method.kd_ratio
        return [mixed_term(items, models, divergence="forward_kl", ce_ratio=ce_ratio, name="pretraining")]


METHOD = LanguageModelling
