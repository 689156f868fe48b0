"""Prompts with their references, from records of any known form, tokenised once."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minillm.config.analysis_keys import Labels
from minillm.config.data import InstructionKeys, PlainPrompts, Prompts
from minillm.data.images import Picture, PictureReader, as_texts, find_pictures, shown_in
from minillm.data.pydoc import pydoc_records
from minillm.data.sources import DataError, Place, Record, read_hf, read_jsonl, read_parquet, read_texts
from minillm.data.templates import render
from minillm.models.batch import TokenSequence
from minillm.models.processors import placeholder_ids, processor_of, same_pictures
from minillm.models.tokenizers import Message, end_of_turn

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# (question, answer, context); the first whose answer is there, else the first whose question is
FORMS = (
    ("instruction", "output", "input"),
    ("instruction", "response", "context"),
    ("prompt", "completion", None),
    ("question", "answer", None),
)


# Of a text whose first n tokens are asked for, so many characters are tokenised at a time, n or more of them as tokens; the
# last tokens before the cut, which the text after it could change, are left out.
_CHARACTERS, _PER_TOKEN, _NEAR_THE_CUT = 65_536, 16, 256


@dataclass(frozen=True)
class Example:
    """One prompt."""

    index: int  # its place in the source: stable whatever is dropped, and the key of its sampling noise
    prompt_ids: list[int]
    response_ids: list[int]  # the first reference and its end, cut at max_response_length; empty without a reference
    prompt: str
    references: tuple[str, ...]
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # as TokenSequence has them

    @property
    def sequence(self) -> TokenSequence:
        """The prompt with its first reference."""
        return TokenSequence(self.prompt_ids, self.response_ids, self.index, self.extras)

    def answered(self, response: list[int]) -> TokenSequence:
        """The prompt with another response in the place of the reference."""
        return TokenSequence(self.prompt_ids, response, self.index, self.extras)


@dataclass(frozen=True)
class PromptSet(Sequence[Example]):
    """The usable prompts of a source."""

    examples: list[Example]
    dropped_long: int  # prompts over max_prompt_length, or max_characters
    source: str

    @property
    def pictured(self) -> int:
        """Prompts that show pictures."""
        return sum(len(example.extras) > 0 for example in self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def require_shared_pictures(
    sets: Mapping[str, PromptSet],
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase | None,
    *,
    ranks: int = 1,
) -> None:
    """Raises DataError where pictures would reach student and teacher as different ones, or the teacher not at all; and
    where several ranks would not all run the part of a model that looks at them.

    Args:
        sets: by the names that errors call them.
        student: the tokenizer that the sets were read with.
        teacher: the teacher's tokenizer, None where there is no teacher.
    """
    pictured = {name: prompts for name, prompts in sets.items() if prompts.pictured}
    for name, prompts in pictured.items():
        if teacher is not None and processor_of(teacher) is None:
            raise DataError(
                f"{name}: its prompts show pictures, and the teacher reads text alone; choose a teacher of images and text, or "
                "take the pictures out of the data"
            )
        different = None if teacher is None else same_pictures(processor_of(student), processor_of(teacher))
        if different is not None:
            raise DataError(
                f"{name}: its prompts show pictures, and student and teacher prepare them differently ({different}); choose a "
                "student of the teacher's family, or prune the teacher (student.init=prune)"
            )
        if ranks > 1 and prompts.pictured < len(prompts):
            raise DataError(
                f"{name}: {prompts.pictured} of {len(prompts)} prompts show pictures; on several ranks all must, or none, since "
                "every rank runs the same layers at the same time. Put them into two stages, or two sets"
            )


def load_prompts(config: Prompts, tokenizer: PreTrainedTokenizerBase, *, name: str = "data.prompts") -> PromptSet:
    """Read, render and tokenise. Raises DataError naming file and line for a record that is of none of the forms."""
    require_end(tokenizer, name)
    examples, dropped = [], 0
    loaded = _plain(config, tokenizer) if isinstance(config, PlainPrompts) else _instructions(config, tokenizer)
    for example in loaded:
        if example is None:
            dropped += 1
            continue
        examples.append(example)
        if len(examples) == config.limit:
            break
    if not examples:
        source = getattr(config, "path", config.type)
        if not dropped:
            raise DataError(f"{name}: no prompt in {source}")
        raise DataError(
            f"{name}: no usable prompt in {source}: all {dropped} are over max_prompt_length="
            f"{config.max_prompt_length} tokens, or max_characters; raise it"
        )
    return PromptSet(examples, dropped, getattr(config, "path", config.type))


def _instructions(config: Prompts, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example | None]:
    """None stands for a prompt that is too long."""
    end = end_of_turn(tokenizer) if config.template == "chat" else None
    if end is None:
        end = tokenizer.eos_token_id
    reader = PromptReader(config, tokenizer)
    special = config.template != "chat"  # a rendered chat already holds its special tokens
    for index, (where, record) in enumerate(records_of(config)):
        messages, context, references = _parse(where, record)
        pictures = find_pictures(where, where.folder, record)
        read = reader.read(messages, pictures, context=context, where=where, limited=True)
        if read is None:
            yield None
            continue
        references = tuple(reference[: config.max_characters] for reference in references)
        response = references[0] if references else ""
        ids = continuation_ids(tokenizer, read.text, read.text_ids, response, special, first=config.max_response_length)
        reader.check_answer(ids, where)
        response_ids = [*ids, end][: config.max_response_length] if references else []
        yield Example(index, read.ids, response_ids, read.text, references, read.extras)


@dataclass(frozen=True)
class ReadPrompt:
    """One prompt as a model reads it."""

    text: str
    ids: list[int]
    text_ids: list[int]  # of the text by itself: a picture is one token
    extras: Mapping[str, Tensor]  # of its pictures


class PromptReader:
    """Puts messages to models: renders and tokenises them, with the pictures that they show."""

    def __init__(self, config: InstructionKeys, tokenizer: PreTrainedTokenizerBase):
        self.config, self.tokenizer = config, tokenizer
        processor = processor_of(tokenizer)
        self.placeholders = frozenset() if processor is None else placeholder_ids(processor)
        self.pictures = None if processor is None else PictureReader(processor, max_pixels=config.max_image_pixels)

    def read(
        self,
        messages: list[Message],
        pictures: Sequence[Picture] = (),
        *,
        context: str = "",
        where: str = "this prompt",
        limited: bool = False,
    ) -> ReadPrompt | None:
        """Args:
            pictures: those that no part of a message names.
            limited: return None for a prompt that is over max_characters or max_prompt_length.

        Raises DataError for pictures that cannot be shown, to this model or at all.
        """
        folder = where.folder if isinstance(where, Place) else Path(".")
        messages, shown = shown_in(where, folder, messages, pictures)
        if not shown:
            messages = as_texts(messages, "")
        elif self.pictures is None:
            raise DataError(
                f"{where}: it shows {len(shown)} pictures, and the tokenizer belongs to a model of text alone; choose a model "
                "of images and text, or take the pictures out of the data"
            )
        text = render(messages, self.config, self.tokenizer, context=context, where=where)
        if limited and len(text) > self.config.max_characters:
            return None
        special = self.config.template != "chat"
        text_ids = ids = encode(self.tokenizer, text, special, first=self.config.max_prompt_length if limited else None)
        if limited and len(ids) > self.config.max_prompt_length:  # pictures only add to them
            return None
        extras: Mapping[str, Tensor] = {}
        if shown:
            ids, extras = self.pictures.read(where, text, shown, special=special)
            if special and ids and ids[-1] == self.tokenizer.eos_token_id and text_ids[-1] != ids[-1]:
                ids = ids[:-1]  # as `encode` has it
        elif self.placeholders & set(ids):
            raise DataError(
                f"{where}: its text says what stands for a picture ({self._said(ids)}), and it shows none; take that out"
            )
        if limited and len(ids) > self.config.max_prompt_length:
            return None
        return ReadPrompt(text, ids, text_ids, extras)

    def check_answer(self, ids: Sequence[int], where: str) -> None:
        """Raises DataError for an answer with what stands for a picture: none can be shown there."""
        if self.placeholders & set(ids):
            raise DataError(f"{where}: its answer says what stands for a picture ({self._said(ids)}); take that out")

    def _said(self, ids: Sequence[int]) -> str:
        return ", ".join(self.tokenizer.convert_ids_to_tokens(sorted(self.placeholders & set(ids))))


def _plain(config: PlainPrompts, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    for index, (_, text) in enumerate(read_texts(config.path)):
        if index < config.skip:
            continue
        ids = encode(tokenizer, text, True, first=config.prompt_length + config.max_response_length)
        prompt_ids, rest = ids[: config.prompt_length], ids[config.prompt_length :]
        if not rest:
            continue
        response_ids = [*rest, tokenizer.eos_token_id][: config.max_response_length]
        prompt = tokenizer.decode(prompt_ids, skip_special_tokens=True)
        reference = tokenizer.decode(rest[: config.max_response_length], skip_special_tokens=True)
        yield Example(index, prompt_ids, response_ids, prompt, (reference,))


def require_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises DataError for a tokenizer with which no text could be closed."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{name}: the tokenizer has no EOS token, and neither its chat template nor the model's generation "
            "configuration names an end, so no answer could be closed; set eos_token in its tokenizer_config.json"
        )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool, *, first: int | None = None) -> list[int]:
    """Ids of a text, never empty: a model needs a token to start from.

    Args:
        first: where only so many of them count, a long text is tokenised as far as that takes, and a few more are returned.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return _beginning(tokenizer, text, special, first) or [start]


def _beginning(tokenizer: PreTrainedTokenizerBase, text: str, special: bool, first: int | None) -> list[int]:
    characters = len(text) if first is None else max(_CHARACTERS, _PER_TOKEN * first)
    while characters < len(text):
        ids = _encode(tokenizer, text[:characters], special)[:-_NEAR_THE_CUT]
        if len(ids) > first:
            return ids
        characters *= 4  # long tokens, or spaces that make none
    return _encode(tokenizer, text, special)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids  # long prompts are dropped, and counted
    if special and ids and ids[-1] == tokenizer.eos_token_id:  # a tokenizer that closes every text
        ids = ids[:-1]
    return ids


def continuation_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    prompt_ids: list[int],
    response: str,
    special: bool,
    *,
    first: int | None = None,
) -> list[int]:
    """The joint tokenisation less the prompt's, where the prompt's is its beginning; else the response's own.

    Args:
        first: as for encode, of the response.
    """
    joint = encode(tokenizer, prompt + response, special, first=None if first is None else len(prompt_ids) + first)
    if joint[: len(prompt_ids)] == prompt_ids:
        return joint[len(prompt_ids) :]
    return _beginning(tokenizer, response, False, first)


def records_of(config: Prompts | Labels) -> Iterator[Record]:
    """The records of a source, whatever it is."""
    if config.type == "jsonl":
        return read_jsonl(config.path)
    if config.type == "parquet":
        return read_parquet(config.path)
    if config.type == "hf":
        return read_hf(config.path, config.name, config.split)
    return pydoc_records(config.split)


def _parse(where: str, record: dict[str, Any]) -> tuple[list[Message], str, tuple[str, ...]]:
    """(messages up to the answer, context, references) of a record of any known form."""
    if record.get("messages") is not None:
        return _parse_messages(where, record["messages"])
    asked = [form for form in FORMS if record.get(form[0]) is not None]
    if not asked:
        known = ", ".join(f"{question}/{answer}" for question, answer, _ in FORMS)
        raise DataError(f"{where}: expected {known} or messages; found the fields {', '.join(record) or 'none'}")
    question, answer, context = next((form for form in asked if record.get(form[1]) is not None), asked[0])
    text = _text(where, question, record[question])
    extra = _text(where, context, record.get(context) or "") if context else ""
    given = record.get(answer)
    given = [] if given is None else given if isinstance(given, list) else [given]
    return [{"role": "user", "content": text}], extra, tuple(_text(where, answer, one) for one in given)


def _parse_messages(where: str, messages: Any) -> tuple[list[Message], str, tuple[str, ...]]:
    right = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str | list)
            for message in messages
        )
    )
    if not right:
        found = json.dumps(messages, default=str)[:80]
        raise DataError(f"{where}: messages: expected a list of {{role, content}}, found {found}")
    messages = [{**message, "content": _content(where, message["content"])} for message in messages]
    for message in messages:
        if message["role"] not in ROLES:
            raise DataError(f"{where}: messages: the role {message['role']!r}; known are {', '.join(ROLES)}")
    if messages[-1]["role"] == "assistant":
        if len(messages) == 1:
            raise DataError(f"{where}: messages: an answer without a question before it")
        answer = messages[-1]["content"]
        if not isinstance(answer, str):
            if any(part["type"] != "text" for part in answer):
                raise DataError(f"{where}: messages: the answer shows a picture; only questions can")
            answer = "".join(part["text"] for part in answer)
        return messages[:-1], "", (answer,)
    return messages, "", ()


def _content(where: str, content: str | list) -> str | list[dict[str, Any]]:
    """A text, or parts of type text and image."""
    if isinstance(content, str):
        return _text(where, "messages", content)
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            parts.append({"type": "text", "text": _text(where, "messages", part.get("text"))})
        elif kind in ("image", "image_url"):
            parts.append({**part, "type": "image"})
        else:
            raise DataError(
                f"{where}: messages: a part of a content must be of type text or image, found {json.dumps(part, default=str)[:80]}"
            )
    return parts


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: expected text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key}: half a character ({error.object[error.start]!r}), which is no text") from None
    return value
