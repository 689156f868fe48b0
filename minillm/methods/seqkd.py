"""Sequence-level distillation (SeqKD, arXiv 1606.07947): the teacher answers every prompt once, the student imitates.

The answers are written before the first step, in batches that survive a kill, and kept for later runs of the stage.
A cached teacher has written them already. With kd_ratio the loss is mixed with the forward KL to the teacher, as
the released MiniLLM scripts do (0.5).
"""

from collections.abc import Sequence

from minillm.methods.protocol import Item, Method, Term, TrainingData
from minillm.methods.supervised import mixed_term
from minillm.methods.written_answers import asked_again, written_answers
from minillm.models.batch import TokenSequence
from minillm.rollout.noise import AGAIN
from minillm.teachers.pair import Models


class SequenceDistillation(Method):
    """L = kd_ratio * KL(p || q) - (1 - kd_ratio) * log q(y), y sampled from the teacher, mean over its tokens."""

    def __init__(self, config):
        super().__init__(config)
        self._answers: dict[int, list[int]] | None = None

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        answers = self.answers_per_prompt
        if self._answers is None:
            asked = asked_again([example.answered([]) for example in data.prompts.items], answers)
            temperature = self.config.method.temperature
            self._answers = written_answers(asked, data, models, self.config, temperature=temperature)
        examples = data.prompts.take(self.step_size // answers)
        return [
            example.answered(self._answers[example.index + AGAIN * time])
            for time in range(answers)
            for example in examples
        ]

    def foreseeable(self, draw: int) -> bool:
        return self._answers is not None

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        return [mixed_term(items, models, divergence="forward_kl", ce_ratio=1.0 - self.config.method.kd_ratio)]


METHOD = SequenceDistillation
