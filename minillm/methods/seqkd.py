"""Sequence-level distillation (SeqKD, arXiv 1606.07947): the teacher answers every prompt once, the student imitates.

The answers are written before the first step, in batches that survive a kill, and kept for later runs of the stage.
With kd_ratio the loss is mixed with the forward KL to the teacher, as the released MiniLLM scripts do (0.5).
"""

from collections.abc import Sequence

from minillm.methods.protocol import Item, Method, Term, TrainingData
from minillm.methods.supervised import mixed_term
from minillm.models.batch import TokenSequence
from minillm.rollout.archive import AnswerArchive
from minillm.rollout.rollouts import Sampling
from minillm.teachers.pair import Models

# The keys of the teacher that its answers depend on.
OF_THE_TEACHER = {"path", "revision", "dtype", "quantization"}


class SequenceDistillation(Method):
    """L = kd_ratio * KL(p || q) - (1 - kd_ratio) * log q(y), y sampled from the teacher, mean over its tokens."""

    def __init__(self, config):
        super().__init__(config)
        self._answers: dict[int, list[int]] | None = None

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        if self._answers is None:
            with data.timing.of("rollout"):
                self._answers = self._write(data, models)
        return [
            TokenSequence(example.prompt_ids, self._answers[example.index], example.index, example.extras)
            for example in data.prompts.take(self.step_size)
        ]

    def _write(self, data: TrainingData, models: Models) -> dict[int, list[int]]:
        rollout = self.config.rollout
        examples = list(data.prompts.items)
        archive = AnswerArchive(data.folder / "answers.jsonl")
        archive.write(
            data.rollouts,
            [example.prompt_ids for example in examples],
            Sampling(rollout.max_new_tokens, self.config.method.temperature, rollout.top_k, rollout.top_p),
            keys=[example.index for example in examples],
            extras=[example.extras for example in examples],
            seed=self.config.seed,
            batch_size=rollout.batch_size,
            vocab_size=models.vocab_size,
            teacher=self.config.teacher.model_dump(mode="json", include=OF_THE_TEACHER),
            progress=lambda done: data.report_progress("the teacher writes", done, len(examples)),
        )
        return archive.read()

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        return [mixed_term(items, models, divergence="forward_kl", ce_ratio=1.0 - self.config.method.kd_ratio)]


METHOD = SequenceDistillation
