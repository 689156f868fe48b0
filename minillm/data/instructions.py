"""Prompts with their references, from records of any known form, tokenised once."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minillm.config.analysis_keys import Labels
from minillm.config.data import PlainPrompts, Prompts
from minillm.data.images import find_pictures
from minillm.data.prompt_reader import PromptReader
from minillm.data.pydoc import pydoc_records
from minillm.data.sources import DataError, Record, read_hf, read_jsonl, read_parquet, read_texts
from minillm.data.tokenization import continuation_ids, encode, require_end
from minillm.models.batch import TokenSequence
from minillm.models.processors import unshared_pictures
from minillm.models.tokenizers import Message, end_of_turn

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
# (question, answer, context); the first whose answer is there, else the first whose question is
FORMS = (
    ("instruction", "output", "input"),
    ("instruction", "response", "context"),
    ("prompt", "completion", None),
    ("question", "answer", None),
)


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
    unshared = unshared_pictures(student, teacher)
    for name, prompts in pictured.items():
        if unshared is not None:
            raise DataError(f"{name}: its prompts show pictures, and {unshared}")
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
