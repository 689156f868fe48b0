"""Answers that reason before they answer, taken apart: the rationale, and the label that it ends in.

A text in which no label can be found gives None for it, and is counted where it is used; no text raises.

    gsm8k    The worked solution, and the number after the last `####`.
    cqa      "RATIONALE So the answer is (x) LABEL."              ) the few-shot formats of Distilling Step-by-Step
    svamp    "RATIONALE The answer is (EQUATION)."                ) (arXiv 2305.02301), up to the next question that
    esnli    "RATIONALE Answer: LABEL"                            ) a model goes on with
    anli     "RATIONALE So the answer is LABEL." or "The answer is LABEL."

Differences from the released parsers of the last four. A text without a marker, or with two of them where one is
expected, has neither rationale nor label; some of those raise. An empty label is no label. A label loses one final full
stop, or exclamation mark, and nothing else: the released one of anli cuts off the last character, whatever it is. The
equation of svamp ends with the parenthesis that closes it, not with the last one of the line.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from minillm.config.data import Parser


@dataclass(frozen=True)
class Reasoned:
    """The parts of an answer, None where they are not found."""

    rationale: str | None = None
    label: str | None = None


def parse_answer(text: str, parser: Parser) -> Reasoned:
    """The rationale and the label of a text, by a parser of those above."""
    return _PARSERS[parser](text)


def _gsm8k(text: str) -> Reasoned:
    rationale, marker, label = text.rpartition("####")
    return _parts(rationale, label.strip().partition("\n")[0]) if marker else Reasoned()


def _cqa(text: str) -> Reasoned:
    rationale, answer = _split_once(text.partition("Q:")[0], "So the answer is")
    choice = re.search(r"\([a-z]\)", answer or "")
    return _parts(rationale, None if choice is None else answer[choice.end() :])


def _svamp(text: str) -> Reasoned:
    rationale, answer = _split_once(text.partition("Q:")[0], "The answer is")
    return _parts(rationale, _in_parentheses(answer or ""))


def _esnli(text: str) -> Reasoned:
    rationale, marker, answer = text.partition("Answer:")
    if not marker:
        return Reasoned()
    label = answer.partition("Answer:")[0].partition("Premise")[0]
    return _parts(rationale, label if label[:1].isspace() else None)


def _anli(text: str) -> Reasoned:
    text = text.partition("Premise:")[0]
    marker = "So the answer is" if "So the answer is" in text else "The answer is"
    return _parts(*_split_once(text, marker))


_PARSERS: dict[str, Callable[[str], Reasoned]] = {
    "gsm8k": _gsm8k,
    "cqa": _cqa,
    "svamp": _svamp,
    "esnli": _esnli,
    "anli": _anli,
}


def _parts(rationale: str | None, label: str | None) -> Reasoned:
    if rationale is None:
        return Reasoned()
    label = (label or "").strip()
    if label[-1:] in (".", "!"):
        label = label[:-1].rstrip()
    return Reasoned(rationale.strip(), label or None)


def _split_once(text: str, marker: str) -> tuple[str | None, str | None]:
    """The text before and after a marker that it has exactly once, else nothing."""
    parts = text.split(marker)
    return (parts[0], parts[1]) if len(parts) == 2 else (None, None)


def _in_parentheses(text: str) -> str | None:
    """The first parenthesis of a text up to the one that closes it, on one line."""
    start, depth = text.find("("), 0
    if start < 0:
        return None
    for place, character in enumerate(text[start:], start):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return text[start : place + 1]
        if character == "\n":
            return None
    return None
