"""Prompts with their references, from records of any known form, tokenised once."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minillm.config.analysis_keys import Labels
from minillm.config.data import PlainPrompts, Prompts
from minillm.data.pydoc import pydoc_records
from minillm.data.sources import DataError, Record, read_hf, read_jsonl, read_parquet, read_texts
from minillm.data.templates import Message, render
from minillm.models.batch import TokenSequence
from minillm.models.tokenizers import end_of_turn

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
    dropped_long: int  # prompts over max_prompt_length
    source: str

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def load_prompts(config: Prompts, tokenizer: PreTrainedTokenizerBase, *, name: str = "data.prompts") -> PromptSet:
    """Read, render and tokenise. Raises DataError naming file and line for a record that is of none of the forms."""
    require_end(tokenizer, name)
    examples, dropped = [], 0
    loaded = _plain(config, tokenizer) if isinstance(config, PlainPrompts) else _instructions(config, tokenizer)
    for example in loaded:
        if len(example.prompt_ids) > config.max_prompt_length:
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
            f"{config.max_prompt_length} tokens; raise it"
        )
    return PromptSet(examples, dropped, getattr(config, "path", config.type))


def _instructions(config: Prompts, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    end = end_of_turn(tokenizer) if config.template == "chat" else None
    if end is None:
        end = tokenizer.eos_token_id
    for index, (where, record) in enumerate(records_of(config)):
        messages, context, references = _parse(where, record)
        prompt = render(messages, config, tokenizer, context=context, where=where)
        # a rendered chat already holds its special tokens
        special = config.template != "chat"
        prompt_ids = encode(tokenizer, prompt, special)
        response = references[0] if references else ""
        ids = continuation_ids(tokenizer, prompt, prompt_ids, response, special)
        response_ids = [*ids, end][: config.max_response_length] if references else []
        yield Example(index, prompt_ids, response_ids, prompt, references)


def _plain(config: PlainPrompts, tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    for index, (_, text) in enumerate(read_texts(config.path)):
        if index < config.skip:
            continue
        ids = encode(tokenizer, text, True)
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


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """Ids of a text, never empty: a model needs a token to start from."""
    ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids  # long prompts are dropped, and counted
    if special and ids and ids[-1] == tokenizer.eos_token_id:  # a tokenizer that closes every text
        ids = ids[:-1]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids or [start]


def continuation_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: list[int], response: str, special: bool
) -> list[int]:
    """The joint tokenisation less the prompt's, where the prompt's is its beginning; else the response's own."""
    joint = encode(tokenizer, prompt + response, special)
    if joint[: len(prompt_ids)] == prompt_ids:
        return joint[len(prompt_ids) :]
    return tokenizer(response, add_special_tokens=False).input_ids


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
            and isinstance(message.get("content"), str)
            for message in messages
        )
    )
    if not right:
        raise DataError(f"{where}: messages: expected a list of {{role, content}}, found {json.dumps(messages)[:80]}")
    for message in messages:
        _text(where, "messages", message["content"])
        if message["role"] not in ROLES:
            raise DataError(f"{where}: messages: the role {message['role']!r}; known are {', '.join(ROLES)}")
    if messages[-1]["role"] == "assistant":
        if len(messages) == 1:
            raise DataError(f"{where}: messages: an answer without a question before it")
        return messages[:-1], "", (messages[-1]["content"],)
    return messages, "", ()


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: expected text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key}: half a character ({error.object[error.start]!r}), which is no text") from None
    return value
