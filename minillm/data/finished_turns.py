"""The answer as a chat template writes it after its prompt: its thoughts, its calls of tools, and what closes it."""

import json
import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from minillm.data.chat_messages import REASONING, call_forms, tool_name
from minillm.data.sources import DataError
from minillm.data.special_text import SpecialTokens, special_tokens_of
from minillm.models.tokenizers import Message, apply_chat_template, in_parts


class Answer(NamedTuple):
    """The text that follows a prompt."""

    text: str  # without what closes it
    end: int | None = None  # the id that closes it; None for the tokenizer's
    misplaced: str | None = None  # why nobody may be trained on it: the model would go on otherwise


def finished_turn(
    prompt: str,
    messages: list[Message],
    answer: Message | None,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    options: dict[str, Any],
) -> Answer | None:
    """An answer after its rendered prompt: the template's own rendering of the finished turn where the prompt is its
    beginning, else the answer's text.

    Args:
        prompt: the rendered messages, ready for an answer.
        messages: in the form that the template reads.
        options: of apply_chat_template.

    Raises DataError where the answer calls tools or has thoughts that the template does not show.
    """
    if answer is None:
        return None
    special = special_tokens_of(tokenizer)
    as_parts = any(isinstance(message["content"], list) for message in messages)
    finished, refused = _render_finished(prompt, messages, in_parts(answer) if as_parts else answer, tokenizer, options)
    text = answer["content"]
    thoughts, calls = answer.get(REASONING[0]), answer.get("tool_calls", ())
    if finished.startswith(prompt):
        turn = _closed(finished[len(prompt) :], tokenizer, special)
        lost = [
            *(["its answer"] if not shows(turn.text, text.rpartition("</think>")[2]) else []),
            *([REASONING[0]] if thoughts and not shows(turn.text, thoughts) else []),
            *([] if _shows_calls(turn.text, calls) else ["its tool calls"]),
        ]
        if lost:
            raise DataError(
                f"{where}: the tokenizer's chat template leaves out {lost[0]}; use a tokenizer whose template knows it, or take "
                "it out of the data"
            )
        return turn
    end = special.end_of_turn
    opened = _opened_thoughts(prompt, finished)
    if calls:
        turn = None if opened is None else _closed(finished[opened.place :], tokenizer, special)
        if turn is None or not _shows_calls(turn.text, calls) or not shows(turn.text, text):
            raise DataError(
                f"{where}: the tokenizer's chat template shows no answer that calls tools after its prompt{refused}; use a "
                "tokenizer whose template knows tools"
            )
        text, end = turn.text.lstrip(), end if turn.end is None else turn.end
    if opened is None:
        if thoughts:
            raise DataError(
                f"{where}: the tokenizer's chat template leaves out {REASONING[0]}{refused}; use a tokenizer whose template "
                "knows it, or take it out of the data"
            )
        return Answer(text, end)
    # the prompt has begun the thoughts
    tag = opened.tag
    if thoughts:
        return Answer(f"{thoughts.strip()}\n</{tag}>\n\n{text}", end)
    begun = text.lstrip()
    if begun.startswith(f"<{tag}>"):
        return Answer(begun.removeprefix(f"<{tag}>").lstrip("\n"), end)
    if f"</{tag}>" in text:
        return Answer(text, end)
    return Answer(
        text,
        end,
        f"the chat template begins the answer with <{tag}>, and the reference has no thoughts to go on with; give them as "
        f"{REASONING[0]}, or close them in its text (</{tag}>), or set template_kwargs so that the template begins none",
    )


def _render_finished(
    prompt: str,
    messages: list[Message],
    answer: Message,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
) -> tuple[str, str]:
    """The finished turn, empty where the template refuses it; and why it does, in brackets.

    Calls of tools are given in the first form that the template shows.
    """
    found, refused = [], ""
    for (form,) in call_forms([answer]):
        try:
            finished = apply_chat_template(tokenizer, [*messages, form], **options)
        except TemplateError as error:
            refused = refused or f" ({error})"
            continue
        if _shows_calls(finished[len(commonprefix([prompt, finished])) :], answer.get("tool_calls", ())):
            return finished, ""
        found.append(finished)
    return (found[0], "") if found else ("", refused)


def _shows_calls(text: str, calls: Sequence[Mapping[str, Any]]) -> bool:
    return all(shows(text, tool_name(call)) for call in calls)


def _closed(rest: str, tokenizer: PreTrainedTokenizerBase, special: SpecialTokens) -> Answer:
    """The text that a template writes after a prompt, cut where it closes the answer."""
    closing = special.closing(rest)
    if not closing:
        return Answer(rest.rstrip())
    ids = tokenizer.convert_tokens_to_ids([name for _, name in closing])
    usual = [one for one in (special.end_of_turn, tokenizer.eos_token_id) if one in ids]
    which = ids.index(usual[0]) if usual else 0
    return Answer(rest[: closing[which][0]], ids[which])


class _Opened(NamedTuple):
    """The tag by which a prompt begins thoughts, and its place in the prompt, with the space before it."""

    tag: str
    place: int


def _opened_thoughts(prompt: str, finished: str) -> _Opened | None:
    """The tag that a prompt ends in, where it begins thoughts that the finished turn does not have at that place."""
    found = re.search(r"<(\w+)>\s*\Z", prompt)
    if found is None:
        return None
    before = prompt[: found.start()].rstrip()
    if not finished.startswith(before) or finished.startswith(prompt.rstrip()):
        return None
    return _Opened(found[1], len(before))


def shows(text: str, said: str) -> bool:
    """True where a rendered text has something in it, as it is but for space around it, or as JSON writes it."""
    said = said.strip()
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text
