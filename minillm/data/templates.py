"""Templates: the text by which an instruction is put to a model."""

import inspect
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from minillm.config.data import TemplateKeys
from minillm.data.chat_messages import REASONING, call_forms, tool_name
from minillm.data.finished_turns import Answer, finished_turn, shows
from minillm.data.images import as_texts
from minillm.data.sources import DataError
from minillm.data.special_text import special_tokens_of
from minillm.models.processors import processor_of
from minillm.models.tokenizers import Message, apply_chat_template, in_parts, message_texts

_PREAMBLE = (
    "Below is an instruction that describes a task{extra}. Write a response that appropriately completes the request."
)
# Arguments of apply_chat_template, and what templates are given beside them.
_OWN_VARIABLES = {
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
    "messages",
    "strftime_now",
}


class Rendered(NamedTuple):
    """A prompt, and the answer that follows it: texts, whose special tokens that people typed are marked."""

    prompt: str
    answer: Answer | None = None


def alpaca(instruction: str, context: str) -> str:
    """The format of the MiniLLM paper's data."""
    if context:
        head = _PREAMBLE.format(extra=", paired with an input that provides further context")
        return f"{head}\n\n### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:\n"
    return f"{_PREAMBLE.format(extra='')}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def render(
    messages: list[Message],
    config: TemplateKeys,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: str = "",
    answer: Message | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    now: datetime | None = None,
    where: str = "this prompt",
) -> Rendered:
    """The prompt: the messages before the answer in the configured template; and the answer as it follows the prompt.

    Contents that are lists of parts show pictures: a chat template says where they stand, elsewhere the token of the
    tokenizer's processor does.

    Args:
        context: stands after the last message.
        tools: JSON schemas of functions, for chat templates.
        variables: of the chat template, beside config.template_kwargs.
        now: what chat templates take for the time; default: the time.
        where: whose messages they are, for errors.

    Raises DataError where the template is `chat` and the tokenizer has none, or has one that refuses the messages (some
    know no system role, others only turns that alternate), or leaves out what a message says.
    """
    special = special_tokens_of(tokenizer)
    system = []
    if config.template == "chat" and config.system is not None and messages[0]["role"] not in ("system", "developer"):
        system = [{"role": "system", "content": config.system}]
    messages = [*system, *messages]
    if config.special_tokens == "text":
        messages, answer, tools, context, variables = special.mark([messages, answer, tools, context, variables])
    if config.template == "chat":
        if not tokenizer.chat_template:
            raise DataError(
                "template: chat needs a tokenizer with a chat template, and this one has none; use template: alpaca or none"
            )
        if context:
            messages = [*messages[:-1], _followed_by(messages[-1], f"\n\n{context}")]
        options = {**config.template_kwargs, **(variables or {}), "tools": tools, "now": now}
        prompt, form = _prompt(messages, tokenizer, where, options)
        return Rendered(prompt, finished_turn(prompt, form, answer, tokenizer, where, options))
    _require_plain(messages, answer, tools, variables, config.template, where)
    processor = processor_of(tokenizer)
    texts = as_texts(messages, "" if processor is None else processor.image_token)
    text = "\n\n".join(message["content"] for message in texts)
    if config.template == "alpaca":
        prompt = alpaca(text, context)
    else:
        prompt = f"{text}\n\n{context}" if context else text
    return Rendered(prompt, None if answer is None else Answer(answer["content"]))


def _prompt(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, where: str, options: dict[str, Any]
) -> tuple[str, list[Message]]:
    """The rendered messages, and the form of them that the template reads: contents as texts, or as lists of parts; and
    calls of tools as `call_forms` says.

    Templates of models of images and text want lists, and most others texts; some drop the other form without a word.
    """
    forms = [messages, [in_parts(message) for message in messages]]
    if processor_of(tokenizer) is not None:
        forms.reverse()
    forms = [one for form in forms for one in call_forms(form)]
    problems = []
    for form in forms:
        try:
            text = apply_chat_template(tokenizer, form, add_generation_prompt=True, **options)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            problems.append(f"the tokenizer's chat template refuses the roles {roles}: {error}")
            continue
        lost = _lost(messages, options["tools"], text)
        if lost is None:
            return text, form
        problems.append(f"the tokenizer's chat template leaves out {lost}")
    raise DataError(f"{where}: {special_tokens_of(tokenizer).plain(problems[0])}")


def _lost(messages: list[Message], tools: Sequence[Mapping[str, Any]] | None, text: str) -> str | None:
    """The first thing that messages and tools say and a rendered text does not, in words."""
    place = 0  # where the message before was found: templates keep their order, or nearly so
    for number, message in enumerate(messages, 1):
        role = message["role"]
        for said in message_texts(message):
            kept = said.rpartition("</think>")[2] if role == "assistant" else said  # of earlier turns the thoughts go
            place = max(0, text.find(kept.strip(), place))
            if place == 0 and not shows(text, kept):
                return (
                    f"what message {number} says ({role}: {kept.strip()[:60]!r}); use another template, or take it out"
                )
        for call in message.get("tool_calls", ()):
            if not shows(text, tool_name(call)):
                return (
                    f"the tool calls of message {number}; use a tokenizer whose template knows tools, or take them out"
                )
        if role not in ("tool", "function", "ipython") and not shows(text, str(message.get("name", ""))):
            return f"the name {message['name']!r} of message {number} ({role}); write it into the text, or take it out"
    missing = next((tool_name(tool) for tool in tools or () if not shows(text, tool_name(tool))), None)
    if missing is not None:
        return (
            f"the tools (such as {missing!r}); use a tokenizer whose template knows them, or take them out of the data"
        )
    return None


def require_variables(tokenizer: PreTrainedTokenizerBase, variables: Mapping[str, Any], key: str) -> None:
    """Raises DataError for variables that the chat template does not read, or that are not for people to set."""
    templates = tokenizer.chat_template or ""
    templates = templates if isinstance(templates, str) else " ".join(templates.values())
    for name in variables:
        if name in _OWN_VARIABLES:
            raise DataError(f"{key}: {name} is set by minillm; it cannot be given")
        if not re.search(rf"\b{re.escape(name)}\b", templates):
            raise DataError(
                f"{key}: the tokenizer's chat template reads no {name}; take it out, or see how it is spelled"
            )


def _require_plain(
    messages: list[Message], answer: Message | None, tools: Any, variables: Any, template: str, where: str
) -> None:
    """Raises DataError for what only a chat template can say."""
    given = {"tools": tools, "chat_template_kwargs": variables}
    for message in [*messages, *([] if answer is None else [answer])]:
        given |= {key: message.get(key) for key in ("tool_calls", REASONING[0]) if message.get(key)}
    found = next((name for name, value in given.items() if value), None)
    if found is not None:
        raise DataError(f"{where}: template {template} has no place for {found}; use template: chat, or take it out")


def _followed_by(message: Message, text: str) -> Message:
    content = message["content"]
    return {
        **message,
        "content": content + text if isinstance(content, str) else [*content, {"type": "text", "text": text}],
    }
