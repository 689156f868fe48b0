"""Classification sets: questions and label words, as the calibration analysis compares them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from minillm.config.analysis_keys import Labels
from minillm.data.fields import fill_question
from minillm.data.images import find_pictures
from minillm.data.instructions import records_of
from minillm.data.sources import DataError
from minillm.data.templates import render, require_variables
from minillm.data.tokenization import continuation_ids, encode


@dataclass(frozen=True)
class Question:
    """One question, and the tokens of every label word as its answer."""

    prompt_ids: list[int]
    word_ids: list[list[int]]  # one a word, without an end
    label: int  # the place of the right word


@dataclass(frozen=True)
class LabelSet:
    """The usable questions of a source."""

    questions: list[Question]
    dropped_long: int  # questions over max_prompt_length

    def ids(self) -> Iterator[list[int]]:
        """The ids of all questions and label words."""
        for question in self.questions:
            yield question.prompt_ids
            yield from question.word_ids

    def __len__(self) -> int:
        return len(self.questions)


def load_labels(
    config: Labels, tokenizer: PreTrainedTokenizerBase, *, name: str, now: datetime | None = None
) -> LabelSet:
    """Read, render and tokenise. `now` is as for load_prompts.

    Raises DataError naming file and line for a record without the fields or the label.
    """
    questions, dropped = [], 0
    special, now = config.template != "chat", now or datetime.now()
    require_variables(tokenizer, config.template_kwargs, f"{name}.template_kwargs")
    for where, record in records_of(config):
        if find_pictures(where, where.folder, record):
            raise DataError(f"{where}: it shows pictures, which questions of {name} cannot; take them out")
        text = fill_question(config.question, record, where)
        prompt = render([{"role": "user", "content": text}], config, tokenizer, now=now, where=where).prompt
        prompt_ids = encode(tokenizer, prompt, special, first=config.max_prompt_length)
        if len(prompt_ids) > config.max_prompt_length:
            dropped += 1
            continue
        words = [continuation_ids(tokenizer, prompt, prompt_ids, word, special) for word in config.words]
        empty = [word for word, ids in zip(config.words, words, strict=True) if not ids]
        if empty:
            raise DataError(f"{name}.words: {empty[0]!r} has no token after the prompt")
        questions.append(Question(prompt_ids, words, _label(where, record, config.label, config.words)))
        if len(questions) == config.limit:
            break
    if not questions:
        limit = config.max_prompt_length
        raise DataError(f"{name}: no usable question ({dropped} over max_prompt_length={limit} tokens); raise it")
    return LabelSet(questions, dropped)


def _label(where: str, record: dict[str, Any], field: str, words: Sequence[str]) -> int:
    value = record.get(field)
    if isinstance(value, bool | int) and 0 <= int(value) < len(words):
        return int(value)
    stripped = [word.strip().lower() for word in words]
    if isinstance(value, str) and value.strip().lower() in stripped:
        return stripped.index(value.strip().lower())
    raise DataError(f"{where}: {field} is {value!r}; expected one of {', '.join(words)}, or a place among them from 0")
