"""Messages of a chat as others write them: checked, and brought into the one form that templates read."""

import json
from typing import Any

from minillm.data.sources import DataError
from minillm.models.tokenizers import Message

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
REASONING = ("reasoning_content", "reasoning", "thinking")  # the first is what templates read
TOOL_CALLS = "give it as tool_calls of a message"  # what to do about a function_call


def read_messages(where: str, name: str, messages: Any) -> list[Message]:
    """The messages of a record's field `name`. Raises DataError for what is no list of {role, content}, or has parts that
    no template is given."""
    if isinstance(messages, list):
        messages = [_calls_alone(message) for message in messages]
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
        raise DataError(f"{where}: {name}: expected a list of {{role, content}}, found {short(messages)}")
    return [_message(where, name, message) for message in messages]


def _calls_alone(message: Any) -> Any:
    """A message that says nothing and calls tools says the empty text."""
    silent = isinstance(message, dict) and message.get("content") is None
    return {**message, "content": ""} if silent and message.get("tool_calls") else message


def _message(where: str, name: str, message: Message) -> Message:
    role = message["role"]
    if role not in ROLES:
        raise DataError(f"{where}: {name}: the role {role!r}; known are {', '.join(ROLES)}")
    if message.get("function_call"):
        raise DataError(f"{where}: {name}: function_call would be ignored; {TOOL_CALLS}")
    message = {key: value for key, value in message.items() if value is not None}  # Parquet fills up what a row lacks
    message["content"] = _content(where, name, message["content"])
    check_text(where, name, {key: value for key, value in message.items() if key not in ("content", "role")})
    reasoning = next((message[key] for key in REASONING if message.get(key)), None)
    if reasoning is not None:
        message[REASONING[0]] = read_text(where, REASONING[0], reasoning)
    if message.get("tool_calls"):
        message["tool_calls"] = [_call(where, name, call) for call in _listed(where, name, message["tool_calls"])]
    else:
        message.pop("tool_calls", None)
    return message


def _listed(where: str, name: str, calls: Any) -> list[Any]:
    if not isinstance(calls, list):
        raise DataError(f"{where}: {name}: tool_calls: expected a list, found {short(calls)}")
    return calls


def _call(where: str, name: str, call: Any) -> dict[str, Any]:
    """A call as templates read it: {type: function, function: {name, arguments}}, with arguments that are an object."""
    if not isinstance(call, dict) or tool_name(call) is None:
        raise DataError(f"{where}: {name}: a tool call must be {{function: {{name, arguments}}}}, found {short(call)}")
    function = call["function"] if isinstance(call.get("function"), dict) else call
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            read = json.loads(arguments)
        except ValueError:
            read = None
        arguments = read if isinstance(read, dict) else arguments
    made = {
        "type": "function",
        "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
    }
    return {**made, "id": call["id"]} if call.get("id") is not None else made


def call_forms(messages: list[Message]) -> list[list[Message]]:
    """The forms in which templates read messages that call tools, the usual one first; one form where none does.

    Arguments are an object, or JSON (DeepSeek's templates join texts); a message that only calls tools says the empty text,
    or nothing (they take its text, be it empty, for the whole of it).
    """
    forms: list[list[Message]] = []
    for silent in (False, True):
        for as_json in (False, True):
            form = [_calling(message, silent, as_json) for message in messages]
            if form not in forms:
                forms.append(form)
    return forms


def _calling(message: Message, silent: bool, as_json: bool) -> Message:
    if not message.get("tool_calls"):
        return message
    message = {**message, "content": None} if silent and not message["content"] else message
    if not as_json:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}


def _content(where: str, name: str, content: str | list) -> str | list[dict[str, Any]]:
    """A text, or parts of type text and image."""
    if isinstance(content, str):
        return read_text(where, name, content)
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            parts.append({"type": "text", "text": read_text(where, name, part.get("text"))})
        elif kind in ("image", "image_url"):
            parts.append({**part, "type": "image"})
        else:
            raise DataError(f"{where}: {name}: a part of a content must be of type text or image, found {short(part)}")
    return parts


def tool_name(tool: dict[str, Any]) -> str | None:
    """The name of a tool, or of a call of one."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else tool.get("name")
    return name if isinstance(name, str) else None


def short(value: Any) -> str:
    """The beginning of a value, for errors."""
    return json.dumps(value, default=str)[:80]


def check_text(where: str, key: str, value: Any) -> None:
    """Raises DataError for half a character anywhere in a value."""
    if isinstance(value, str):
        read_text(where, key, value)
    elif isinstance(value, dict):
        for one in value.values():
            check_text(where, key, one)
    elif isinstance(value, list):
        for one in value:
            check_text(where, key, one)


def read_text(where: str, key: str, value: Any) -> str:
    """The value itself. Raises DataError for one that is no text, or holds half a character."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: expected text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key}: half a character ({error.object[error.start]!r}), which is no text") from None
    return value
