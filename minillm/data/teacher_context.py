"""A prompt as the teacher reads it: beside a context that it alone is given, and in its own ids; with a summary of these
contexts that reports show."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from minillm.config.data import FIELD_PART, RecordKeys
from minillm.data.fields import fill_question
from minillm.data.images import Picture, as_texts, shown_in
from minillm.data.other_reading import OtherReading, read_otherwise
from minillm.data.prompt_reader import PromptReader
from minillm.data.records import Conversation
from minillm.data.sources import DataError, Place
from minillm.storage.atomic import write_text

SUMMARY = "teacher_context.json"
SHOWN, SHOWN_CHARACTERS = 3, 2000
_NAME = re.compile(r"\w+")
REFERENCE = "reference"  # the record's first answer, whatever its form; a field of that name comes first


@dataclass(frozen=True)
class TeachersPrompt:
    """The part of a prompt that is otherwise for the teacher; empty where it reads what the student does."""

    text: str | None = None  # with its context; None without one
    ids: list[int] | None = None  # of that text, where the tokenizer is the student's
    other: OtherReading | None = None  # where it is not


class TeacherReader:
    """Reads records as the teacher does.

    Args:
        tokenizer: the student's.
        other: the teacher's, where it is another one.
        now: what chat templates take for the time.
        name: of the set of prompts, for errors.

    Raises DataError as PromptReader does.
    """

    def __init__(
        self,
        config: RecordKeys,
        tokenizer: PreTrainedTokenizerBase,
        other: PreTrainedTokenizerBase | None,
        now: datetime | None,
        name: str,
    ):
        self._config, self._other, self._key = config, other, f"{name}.teacher_context"
        keys = config.model_copy(update={"max_prompt_length": config.longest_for_teacher})
        reads = other is not None or config.teacher_context is not None
        self._reader = PromptReader(keys, other or tokenizer, now) if reads else None

    def read(
        self, said: Conversation, fields: Mapping[str, Any], pictures: Sequence[Picture], where: str
    ) -> TeachersPrompt | None:
        """None for a prompt that is too long.

        Args: fields: of the record, that the context may name.

        Raises DataError for a field that the record has not, that is null, or that is neither text nor a number; for pictures
        that the teacher would be shown otherwise than the student; and whatever reading raises.
        """
        context, untold = self._context(said, fields, where), said
        if context:
            said = told(said, context, self._config.teacher_prompt, where)
        if self._other is not None:
            other = read_otherwise(self._reader, said, pictures, where)
            return None if other is None else TeachersPrompt(other.text if context else None, other=other)
        if not context:
            return TeachersPrompt()
        of_prompt, place = said.with_answer(None), _as_read_by_teacher(where)
        _require_same_pictures(untold, of_prompt, pictures, place)
        read = self._reader.read(of_prompt, pictures, where=place, limited=True)
        return None if read is None else TeachersPrompt(read.text, read.ids)

    def _context(self, said: Conversation, fields: Mapping[str, Any], where: str) -> str:
        text = self._config.teacher_context
        if text is None:
            return ""
        answer = {REFERENCE: said.references[0]} if said.references else {}
        return fill_question(f"{{{text}}}" if _NAME.fullmatch(text) else text, {**answer, **fields}, where, self._key)


def told(said: Conversation, context: str, form: str, where: str) -> Conversation:
    """The conversation with the context in its last message of the user, whose pictures stay where they are in the prompt.

    Args: form: that message, with {prompt} and {context} in it.

    Raises DataError where no message is the user's.
    """
    messages = list(said.messages)
    places = [place for place, message in enumerate(messages) if message["role"] == "user"]
    if not places:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(
            f"{where}: the teacher's context stands in a message of the user, and there are those of {roles}"
        )
    last = messages[places[-1]]
    parts = last["content"] if isinstance(last["content"], list) else [_text(last["content"])]
    values, content, end = {"prompt": parts, "context": [_text(context)]}, [], 0
    for found in FIELD_PART.finditer(form):
        content += [_text(form[end : found.start()]), *(values[found[1]] if found[1] else [_text(found[0][0])])]
        end = found.end()
    content.append(_text(form[end:]))
    message = {**last, "content": content}
    if all(part["type"] == "text" for part in content):
        message = as_texts([message], "")[0]
    messages[places[-1]] = message
    return replace(said, messages=messages)


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _as_read_by_teacher(where: str) -> str:
    said = f"{where}, as the teacher reads it"
    return Place(said, where.folder, where.source) if isinstance(where, Place) else said


def _require_same_pictures(
    student: Conversation, teacher: Conversation, pictures: Sequence[Picture], where: str
) -> None:
    """Raises DataError where the two would not be shown the same pictures in the same order: they are read once for both."""
    folder = where.folder if isinstance(where, Place) else Path(".")
    ours, theirs = (
        [one.name for one in shown_in(where, folder, said.messages, pictures)[1]] for said in (student, teacher)
    )
    if ours != theirs:
        raise DataError(
            f"{where}: it is shown {len(theirs)} pictures, and the student {len(ours)}; teacher_prompt must have {{prompt}} "
            "once, where the pictures stand"
        )


def write_summary(folder: Path, prompts: Sequence[tuple[str, str | None]]) -> None:
    """Write how many prompts have a context, and some of them as both models read them.

    Args: prompts: as the student and the teacher read them, None where it is the same.
    """
    having = [(student, teacher) for student, teacher in prompts if teacher is not None]
    samples = [
        {"student": student[-SHOWN_CHARACTERS:], "teacher": teacher[-SHOWN_CHARACTERS:]}
        for student, teacher in having[:SHOWN]
    ]
    folder.mkdir(parents=True, exist_ok=True)
    content = {"prompts": len(prompts), "with_context": len(having), "samples": samples}
    write_text(folder / SUMMARY, json.dumps(content, indent=1, ensure_ascii=False))
