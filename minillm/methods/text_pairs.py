"""One text in the ids of two tokenizers: what the methods train on whose teacher has another one than the student."""

from collections.abc import Sequence
from dataclasses import dataclass

from minillm.data.instructions import Example
from minillm.methods.protocol import TrainingData
from minillm.models.batch import TokenBatch, TokenSequence, collate
from minillm.teachers.pair import Models


@dataclass(frozen=True)
class PairedText:
    """A prompt with an answer as the student reads it, and as the teacher does."""

    key: int
    sequence: TokenSequence
    teacher: TokenSequence
    sampled: bool = False  # the student has written the answer

    @property
    def width(self) -> int:
        """Tokens of the longer reading."""
        return max(self.sequence.width, self.teacher.width)


def take_paired_references(data: TrainingData, size: int) -> list[PairedText]:
    """The next `size` prompts with their references, in both readings."""
    return [paired(one, one.response_ids, one.other.answer_ids) for one in data.prompts.take(size)]


def paired(example: Example, response: list[int], teacher_response: list[int], *, sampled: bool = False) -> PairedText:
    """A prompt with an answer in the ids of both."""
    theirs = TokenSequence(example.other.ids, teacher_response, example.index)
    return PairedText(example.index, example.answered(response), theirs, sampled)


def collate_pairs(items: Sequence[PairedText], models: Models) -> tuple[TokenBatch, TokenBatch]:
    """The batch of the student, and that of the teacher."""
    ours = collate([item.sequence for item in items], models.pad_id)
    return ours, collate([item.teacher for item in items], models.tokenizers.pad_id)
