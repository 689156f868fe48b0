"""Pairs of a chosen and a rejected answer to one prompt, from records of any known form, tokenised once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from minillm.config.data import PairKeys, Pairs
from minillm.data.chat_messages import read_messages, read_text
from minillm.data.images import find_pictures
from minillm.data.instructions import read_question, records_of
from minillm.data.prompt_reader import PromptReader, ReadPrompt
from minillm.data.records import QUESTIONS, Conversation, answer_message
from minillm.data.sources import DataError
from minillm.data.tokenization import require_end
from minillm.models.batch import TokenSequence
from minillm.models.tokenizers import Message


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to a prompt, the first preferred."""

    key: int  # of the prompt: its place in the data
    chosen: TokenSequence
    rejected: TokenSequence

    @property
    def width(self) -> int:
        """Tokens of the prompt with the longer answer."""
        return max(self.chosen.width, self.rejected.width)


@dataclass(frozen=True)
class PairSet(Sequence[AnswerPair]):
    """The usable pairs of a source."""

    pairs: list[AnswerPair]
    dropped_long: int  # with a prompt over max_prompt_length, or max_characters
    dropped_alike: int  # whose answers are the same, as they are given or as far as max_response_length
    typed: int  # that spell special tokens, which are text in them
    source: str

    @property
    def pictured(self) -> int:
        """Pairs whose prompt shows pictures."""
        return sum(len(pair.chosen.extras) > 0 for pair in self.pairs)

    def ids(self) -> Iterator[list[int]]:
        """The ids of all prompts and answers."""
        for pair in self.pairs:
            yield pair.chosen.prompt
            yield pair.chosen.response
            yield pair.rejected.response

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


def load_pairs(
    config: Pairs, tokenizer: PreTrainedTokenizerBase, *, name: str = "data.pairs", now: datetime | None = None
) -> PairSet:
    """Read, render and tokenise. Answers are cut at max_response_length as references are.

    Args:
        name: of the set, for errors.
        now: what chat templates take for the time; default: the time.

    Raises DataError naming file and line for a record without a question, without one of the answers, or with an empty
    one; for a conversation that does not belong to the question; and for what a template leaves out or puts elsewhere.
    """
    require_end(tokenizer, name)
    reader, pairs, long, alike, typed = PromptReader(config, tokenizer, now), [], 0, 0, 0
    for index, (where, record) in enumerate(records_of(config)):
        said, *answers = _split(where, record, config)
        if answers[0] == answers[1]:
            alike += 1
            continue
        read = _read(where, said, answers, record, reader)
        if read is None:
            long += 1
            continue
        chosen, rejected = (TokenSequence(one.ids, one.answer_ids, index, one.extras) for one in read)
        if chosen.response == rejected.response:
            alike += 1
            continue
        typed += any(one.typed for one in read)
        pairs.append(AnswerPair(index, chosen, rejected))
        if len(pairs) == config.limit:
            break
    source = getattr(config, "path", config.type)
    if not pairs:
        dropped = (
            f": {long} are over max_prompt_length={config.max_prompt_length} tokens, or max_characters, and the answers of "
            f"{alike} are alike, as far as max_response_length={config.max_response_length} tokens"
        )
        raise DataError(f"{name}: no usable pair in {source}{dropped if long or alike else ''}")
    return PairSet(pairs, long, alike, typed, source)


def _split(where: str, record: Mapping[str, Any], config: PairKeys) -> tuple[Conversation, Message, Message]:
    """The prompt, the chosen answer and the rejected one."""
    names = (config.chosen, config.rejected)
    (turns, chosen), (other_turns, rejected) = (_answer(where, name, record) for name in names)
    rest = {key: value for key, value in record.items() if key not in names}
    asked = config.question is not None or any(rest.get(key) is not None for key in ("messages", *QUESTIONS))
    if not asked and turns and other_turns:
        if turns != other_turns:
            raise DataError(
                f"{where}: the conversations before {names[0]} and {names[1]} differ; a pair has one prompt"
            )
        rest["messages"] = turns
    said = read_question(where, rest, config)
    if said.answer is not None and said.answer["content"] != chosen["content"]:
        raise DataError(
            f"{where}: it has another answer beside {names[0]} and {names[1]}, which would be ignored; take it out, or say "
            "which fields the question is made of (data.pairs.question)"
        )
    for name, before in zip(names, (turns, other_turns), strict=True):
        if config.question is None and before and not _is_question(before, said.messages):
            raise DataError(
                f"{where}: {name}: the conversation before the answer is not the question of the record; keep one of them"
            )
    return said.with_prefix(config.prefix).with_answer(None), chosen, rejected


def _answer(where: str, name: str, record: Mapping[str, Any]) -> tuple[list[Message], Message]:
    """The messages before an answer, where it is a whole conversation, and the answer."""
    value = record.get(name)
    if value is None:
        there = ", ".join(key for key, one in record.items() if one is not None) or "none"
        raise DataError(f"{where}: no field {name}, which a pair needs; it has {there}")
    if not isinstance(value, list):
        turns, answer = [], {"role": "assistant", "content": read_text(where, name, value)}
    else:
        *turns, answer = read_messages(where, name, value)
        if answer["role"] != "assistant":
            raise DataError(
                f"{where}: {name}: the last message is of {answer['role']}; expected the assistant's answer"
            )
        answer = answer_message(where, name, answer)
    if not answer["content"].strip() and not answer.get("tool_calls"):
        raise DataError(f"{where}: {name} is empty; an answer says something")
    return turns, answer


def _is_question(turns: list[Message], question: list[Message]) -> bool:
    """True for the messages of a question, be it without its system message."""
    return turns == question or question[0]["role"] in ("system", "developer") and turns == question[1:]


def _read(
    where: str, said: Conversation, answers: Sequence[Message], record: Mapping[str, Any], reader: PromptReader
) -> list[ReadPrompt] | None:
    """The prompt with each answer, or None where it is too long."""
    pictures = find_pictures(where, where.folder, record)
    read: list[ReadPrompt] = []
    for which, answer in zip(("chosen", "rejected"), answers, strict=True):
        before = read[0] if read else None
        one = reader.read(replace(said, answer=answer), pictures, where=where, limited=True, before=before)
        if one is None:
            return None
        if one.misplaced is not None:
            raise DataError(f"{where}: the {which} answer: {one.misplaced}")
        read.append(one)
    return read
