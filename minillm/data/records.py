"""Records of every known form as conversations. A field that changes what a record says is read, or refused by name."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from minillm.data.chat_messages import REASONING, TOOL_CALLS, check_text, read_messages, read_text, short, tool_name
from minillm.data.sources import DataError
from minillm.models.tokenizers import Message

# (question, answer); the first whose answer is there, else the first whose question is
FORMS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
)
QUESTIONS = ("instruction", "prompt", "question")
ANSWERS = ("output", "response", "completion", "answer")
CONTEXTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")
# Fields that change what a record says, and what to do about them.
REFUSED = {
    "functions": "give them as tools: [{type: function, function: {...}}]",
    "function_call": TOOL_CALLS,
    "documents": "put them into the question, or its context",
    "audio": "models of sound are not known here",
    "audios": "models of sound are not known here",
    "video": "models of video are not known here",
    "videos": "models of video are not known here",
}
# Other names for an answer, which is missed where none of ANSWERS is there.
OTHER_ANSWERS = (
    "chosen",
    "rejected",
    "answers",
    "solution",
    "target",
    "targets",
    "outputs",
    "responses",
    "completions",
)


@dataclass(frozen=True)
class Conversation:
    """The content of a record."""

    messages: list[Message]  # up to the answer
    answer: Message | None = None  # the first reference, as a message of the assistant
    references: tuple[str, ...] = ()  # the first one is empty where the answer is a call of tools alone
    context: str = ""
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)  # of the template, for this record

    def with_answer(self, answer: str | None) -> "Conversation":
        """The conversation with another answer in the place of its references, or with none."""
        if answer is None:
            return replace(self, answer=None, references=())
        return replace(self, answer={"role": "assistant", "content": answer}, references=(answer,))

    def with_prefix(self, prefix: str) -> "Conversation":
        """The conversation with a text before the last message that is to be answered."""
        if not prefix:
            return self
        *before, last = self.messages
        content = last["content"]
        content = prefix + content if isinstance(content, str) else [{"type": "text", "text": prefix}, *content]
        return replace(self, messages=[*before, {**last, "content": content}])


def parse(where: str, record: dict[str, Any]) -> Conversation:
    """The conversation of a record of any known form. Raises DataError, which names the place, for one of none."""
    for name, remedy in REFUSED.items():
        if record.get(name):
            raise DataError(f"{where}: {name} would be ignored; {remedy}")
    _check_weight(where, "", record)
    options = {"tools": _tools(where, record.get("tools")), "variables": _variables(where, record)}
    if record.get("messages") is not None:
        found = read_messages(where, "messages", record["messages"])
        return _of_messages(where, record, found, options)
    forms = [*FORMS, *((one, other) for one in QUESTIONS for other in ANSWERS if (one, other) not in FORMS)]
    asked = [form for form in forms if record.get(form[0]) is not None]
    if not asked:
        known = ", ".join(f"{question}/{answer}" for question, answer in FORMS)
        raise DataError(f"{where}: expected {known} or messages; found the fields {', '.join(record) or 'none'}")
    question, answer = next((form for form in asked if record.get(form[1]) is not None), asked[0])
    if question == "question":
        _require_one(
            where, record, ("instruction", "question"), "what is said before every question is a system message"
        )
    _require_one(
        where, record, [name for name in ANSWERS if record.get(name) is not None], "several references are a list"
    )
    if record.get(answer) is None:
        _require_no_answer(where, record)
    if isinstance(record[question], list):  # a conversation as prompt and completion
        found = read_messages(where, question, record[question])
        completion = record.get(answer)
        if completion is not None:
            found += read_messages(where, answer, completion) if isinstance(completion, list) else []
            if not isinstance(completion, list):
                found.append({"role": "assistant", "content": read_text(where, answer, completion)})
        return _of_messages(where, record, found, options)
    text = read_text(where, question, record[question])
    given = record.get(answer)
    given = [] if given is None else given if isinstance(given, list) else [given]
    references = tuple(read_text(where, answer, one) for one in given)
    messages = [*_before(where, record), {"role": "user", "content": text}]
    finished = {"role": "assistant", "content": references[0]} if references else None
    finished = _with_reasoning(where, record, finished)
    return Conversation(messages, finished, references, _context(where, record, question), **options)


def _of_messages(where: str, record: dict[str, Any], messages: list[Message], options: dict[str, Any]) -> Conversation:
    given = [name for name in SYSTEMS if _said(record, name)]
    if given and messages[0]["role"] == "system":
        if messages[0]["content"] != record[given[0]]:
            raise DataError(f"{where}: {given[0]} and messages both have a system message, and another one; keep one")
        given = []
    if _said(record, "history"):
        raise DataError(f"{where}: history beside messages would be ignored; put its turns into messages")
    messages = [*_system(where, record), *messages] if given else messages
    context = _context(where, record, "messages")
    last = messages[-1]
    if last["role"] == "assistant":
        if len(messages) == 1:
            raise DataError(f"{where}: messages: an answer without a question before it")
        last = answer_message(where, "messages", last)
        content = last["content"]
        missed = next(
            (name for name in ANSWERS if _said(record, name) and record[name] not in (content, [content])), None
        )
        if missed is not None and record.get("messages") is not None:
            raise DataError(f"{where}: {missed} and the last of messages differ, and one would be ignored; keep one")
        finished = _with_reasoning(where, record, last)
        return Conversation(messages[:-1], finished, (content,), context, **options)
    given = [name for name in ANSWERS if record.get(name) is not None]
    _require_one(where, record, given, "several references are a list")
    if not given:
        _require_no_answer(where, record)
        return Conversation(messages, context=context, **options)
    value = record[given[0]]
    references = tuple(read_text(where, given[0], one) for one in (value if isinstance(value, list) else [value]))
    finished = {"role": "assistant", "content": references[0]} if references else None
    return Conversation(messages, _with_reasoning(where, record, finished), references, context, **options)


def answer_message(where: str, name: str, message: Message) -> Message:
    """The last message of a record's field `name`, with a content that is a text. Raises DataError for one that shows a picture."""
    _check_weight(where, f"{name}: the answer's ", message)
    content = message["content"]
    if not isinstance(content, str):
        if any(part["type"] != "text" for part in content):
            raise DataError(f"{where}: {name}: the answer shows a picture; only questions can")
        content = "".join(part["text"] for part in content)
    return {**message, "content": content}


def _before(where: str, record: dict[str, Any]) -> list[Message]:
    """The turns before the question of a record that is no list of messages."""
    turns = record.get("history") or []
    if not isinstance(turns, list):
        raise DataError(f"{where}: history: expected a list of [question, answer], found {short(turns)}")
    if turns and all(isinstance(turn, dict) for turn in turns):
        return [*_system(where, record), *read_messages(where, "history", turns)]
    messages = _system(where, record)
    for turn in turns:
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError(f"{where}: history: expected a list of [question, answer], found {short(turn)}")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": read_text(where, "history", text)})
    return messages


def _system(where: str, record: dict[str, Any]) -> list[Message]:
    given = [name for name in SYSTEMS if _said(record, name)]
    _require_one(where, record, given, "they are two system messages")
    return [{"role": "system", "content": read_text(where, given[0], record[given[0]])}] if given else []


def _context(where: str, record: dict[str, Any], question: str) -> str:
    if question == "prompt" and record.get("instruction") is not None:
        return ""  # which the prompt was made of
    given = [name for name in CONTEXTS if _said(record, name)]
    if question == "messages" and given:
        raise DataError(f"{where}: {given[0]} beside messages would be ignored; put it into the messages")
    _require_one(where, record, given, "both would be shown after the question")
    return read_text(where, given[0], record[given[0]]) if given else ""


def _with_reasoning(where: str, record: dict[str, Any], answer: Message | None) -> Message | None:
    given = [name for name in REASONING if _said(record, name)]
    if not given or answer is not None and answer.get(REASONING[0]):
        return answer
    if answer is None:
        raise DataError(f"{where}: {given[0]} without an answer would be ignored; give the answer, or take it out")
    return {**answer, REASONING[0]: read_text(where, given[0], record[given[0]])}


def _tools(where: str, value: Any) -> list[dict[str, Any]] | None:
    """The tools of a record: JSON schemas of functions, as a list or the text of one."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(f"{where}: tools: not JSON ({error}); expected a list of functions") from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(one, dict) and tool_name(one) for one in value):
        raise DataError(
            f"{where}: tools: expected a list of {{type: function, function: {{name, ...}}}}, found {short(value)}"
        )
    check_text(where, "tools", value)
    return value


def _variables(where: str, record: dict[str, Any]) -> dict[str, Any]:
    value = record.get("chat_template_kwargs") or {}
    if not isinstance(value, dict):
        raise DataError(f"{where}: chat_template_kwargs: expected an object, found {short(value)}")
    return {name: one for name, one in value.items() if one is not None}  # Parquet fills up what a row lacks


def _check_weight(where: str, whose: str, record: dict[str, Any]) -> None:
    """Raises DataError for an answer that counts more or less than others."""
    for name, neutral in (("weight", 1), ("train", True)):
        value = record.get(name)
        if value is not None and value != neutral:
            raise DataError(
                f"{where}: {whose}{name} is {short(value)}, and every answer counts alike here; take the record out, or repeat it"
            )


def _require_one(where: str, record: dict[str, Any], names: Iterable[str], hint: str) -> None:
    """Raises DataError where fields of one meaning say different things."""
    given = [name for name in names if _said(record, name)]
    for name in given[1:]:
        if record[name] != record[given[0]]:
            raise DataError(f"{where}: {given[0]} and {name} differ, and one would be ignored; keep one ({hint})")


def _require_no_answer(where: str, record: dict[str, Any]) -> None:
    missed = next((name for name in OTHER_ANSWERS if _said(record, name)), None)
    if missed is not None:
        raise DataError(
            f"{where}: {missed} would be ignored; an answer is called {', '.join(ANSWERS)}. Rename it, or take it out"
        )


def _said(record: dict[str, Any], name: str) -> bool:
    return record.get(name) not in (None, "", [], {})
