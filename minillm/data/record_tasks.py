"""The tasks that are made of one record, a prompt and an answer each."""

from collections.abc import Mapping, Sequence
from typing import Any

from minillm.config.data import TaskKeys
from minillm.data.fields import fill
from minillm.data.images import Picture
from minillm.data.prompt_reader import PromptReader, ReadPrompt
from minillm.data.records import Conversation
from minillm.data.sources import DataError
from minillm.models.batch import TokenSequence


class RecordTasks:
    """Makes the tasks of a record: of its fields, and again where some of them are written later.

    Args:
        said: the question.
        fields: of the record, by which the tasks' answers are filled.
        index: its place in the data.
        where: its place, for errors.
    """

    def __init__(
        self,
        tasks: Mapping[str, TaskKeys],
        reader: PromptReader,
        said: Conversation,
        pictures: Sequence[Picture],
        fields: Mapping[str, Any],
        *,
        index: int,
        where: str,
    ):
        self._tasks, self._reader, self._said, self._pictures = tasks, reader, said, pictures
        self._fields, self._index, self._where = fields, index, where
        self._read: dict[str, ReadPrompt] = {}

    def make(self, written: Mapping[str, str | None]) -> dict[str, TokenSequence] | None:
        """The sequence of every task, without a response where the record has no answer to it; None where a prompt is too long.

        Args: written: fields in the place of the record's own.

        Raises DataError for a field that the record has not, and for an answer that the template puts elsewhere.
        """
        made, fields = {}, {**self._fields, **written}
        for name, task in self._tasks.items():
            answer = fill(task.answer, fields, self._where, f"the answer of task {name}")
            said = self._said.with_prefix(task.prefix).with_answer(answer)
            read = self._reader.read(said, self._pictures, where=self._where, limited=True, before=self._read.get(name))
            if read is None:
                return None
            if read.misplaced is not None:
                raise DataError(f"{self._where}: the answer of task {name}: {read.misplaced}")
            self._read[name] = read
            made[name] = TokenSequence(read.ids, read.answer_ids, self._index, read.extras)
        return made

    @property
    def typed(self) -> bool:
        """True where special tokens are text in a task as it was made last."""
        return any(read.typed for read in self._read.values())
