"""Distilling step by step (arXiv 2305.02301): one student learns labels and the rationales behind them, as two tasks.

    L = sum over tasks k of  w_k  mean over the tokens of the answers of k of  -log q(y_t | y_<t, prefix_k + x)

Every task has a mean of its own: a rationale of fifty tokens does not drown a label of two, as it would in one mean over
both. At test time the label is asked for alone, by its prefix. A record without an answer to a task, such as one in whose
text no label was found, takes no part in that task, and is counted.

Rationales, and labels, are the data's or the teacher's, which writes them once in answer to a few-shot prompt, before the
first step; the answers are kept on disk (minillm/rollout/archive.py), and read by a parser each time.

Differences from the paper. Its students are encoders with decoders (T5), which read the question in the encoder; here they
are decoders alone, which read it as a prompt whose tokens are not predicted. Its code weights the two losses by 0.5 each
(alpha and 1 - alpha); here, as in the paper's formula, a weight is 1 where nothing else is said. Any number of tasks is
allowed: `answer: "{rationale} So the answer is {label}."` is the one task of a student that reasons first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from minillm.data.rationales import read_answer, write_summary
from minillm.distributed import collectives
from minillm.losses import TokenStats
from minillm.methods.protocol import Method, Observation, Term, TrainingData
from minillm.methods.written_answers import written_answers
from minillm.models.batch import TokenSequence, collate
from minillm.teachers.pair import Models


@dataclass(frozen=True)
class TaskRecord:
    """The tasks of one record."""

    key: int
    tasks: dict[str, TokenSequence]  # a response is empty where the record has none

    @property
    def width(self) -> int:
        """Tokens of the longest task."""
        return max(task.width for task in self.tasks.values())


class StepByStep(Method):
    """See the module."""

    def __init__(self, config):
        super().__init__(config)
        self.missing: dict[str, float] = {}  # task -> percentage of the step's records without an answer to it
        self._written: dict[int, dict[str, TokenSequence]] | None = None  # key of a record -> its tasks

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TaskRecord]:
        if self.needs.written and self._written is None:
            self._written = self._tasks_written(data, models)
        examples = data.prompts.take(self.step_size)
        records = [
            TaskRecord(one.index, dict(one.tasks if self._written is None else self._written[one.index]))
            for one in examples
        ]
        for name in self.config.method.tasks:
            bare = sum(not record.tasks[name].response for record in records)
            self.missing[f"unanswered_percent/{name}"] = 100.0 * bare / len(records)
        return records

    def _tasks_written(self, data: TrainingData, models: Models) -> dict[int, dict[str, TokenSequence]]:
        """The tasks of all records, with the rationales and labels that the teacher wrote."""
        few_shot, examples = self.needs.few_shot, data.prompts.items
        asked = [example.asked for example in examples]
        found = written_answers(asked, data, models, self.config, temperature=few_shot.temperature)
        texts = [models.tokenizer.decode(found[one.index], skip_special_tokens=True) for one in examples]
        parts = [read_answer(text, few_shot) for text in texts]
        questions = [example.prompt for example in examples]
        collectives.on_rank_0(lambda: write_summary(data.folder, questions, texts, parts, few_shot))
        return {
            example.index: example.maker.make({name: getattr(part, name) for name in self.needs.written})
            for example, part in zip(examples, parts, strict=True)
        }

    def terms(self, items: Sequence[TaskRecord], data: TrainingData, models: Models) -> list[Term]:
        return [
            task_term(name, [item.tasks[name] for item in items], models, weight=task.weight)
            for name, task in self.config.method.tasks.items()
        ]

    def observe(self, observation: Observation) -> dict[str, float]:
        return dict(self.missing) if observation.kind == "step" else {}


def task_term(name: str, answers: Sequence[TokenSequence], models: Models, *, weight: float) -> Term:
    """The mean cross-entropy over the tokens that a task's answers have in the whole step."""
    batch = collate(answers, models.pad_id)  # those without a response have no rows, on every rank the same layers run

    def objective(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:  # (C,)
        loss = -stats.student_logprob
        return loss, {f"cross_entropy_nats/{name}": loss.detach()}

    return Term(name, batch, objective, ("student_logprob",), float(len(batch.labels)), weight)


METHOD = StepByStep
