"""The messages of vLLM's form of the OpenAI protocol that concern a teacher: token ids go in as JSON, and for every token of
a text the log-probabilities of the likeliest ids at its place come out, beside its own."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minillm.models.batch import TokenSequence
from minillm.teachers.wire import BadMessage

IMPOSSIBLE = -9999.0  # stands for -inf in JSON
MOST = 1 + 1e-4  # that probabilities may add up to, with their rounding


class TooFewIds(Exception):
    """Rows that hold so many ids which student and teacher do not share that fewer than k are left."""

    def __init__(self, lacking: int):
        super().__init__()
        self.lacking = lacking


@dataclass(frozen=True)
class LogprobsRequest:
    """Texts whose responses are to be predicted, and the number of ids a token: POST /v1/completions.

    A row is for a token of a response, and has that token's own id first and the k - 1 likeliest others after it. Where the
    token is among the k likeliest, these are they; where it is not, it stands in the place of the last.
    """

    texts: tuple[tuple[int, ...], ...]  # prompt and response, one after the other
    firsts: tuple[int, ...]  # the place of each text's first response id
    k: int  # ids a row

    @classmethod
    def of(cls, sequences: tuple[TokenSequence, ...], k: int) -> "LogprobsRequest":
        """The request for the rows of some texts; those without a response have none, and are left out."""
        there = [one for one in sequences if one.response]
        return cls(tuple((*one.prompt, *one.response) for one in there), tuple(len(one.prompt) for one in there), k)

    @property
    def count(self) -> int:
        """The number of rows: response tokens."""
        return sum(len(text) - first for text, first in zip(self.texts, self.firsts, strict=True))

    @property
    def longest(self) -> int:
        """Ids of the longest text."""
        return max(map(len, self.texts), default=0)

    def body(self, model: str, *, more: int = 0) -> bytes:
        """The request as JSON, for k ids and `more`. One token is drawn, since servers want at least one; what would change
        a distribution says that it does not, whatever a server's own defaults are."""
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
                   "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip
        asked = {"model": model, "prompt": self.texts, "max_tokens": 1, "prompt_logprobs": self.k + more}
        return json.dumps(asked | neutral).encode()

    def read(self, said: Mapping[str, Any], *, size: int = 2**31) -> tuple[Tensor, Tensor]:  # (N, k) int64, (N, k) fp32
        """The rows of an answer in nats, of ids below `size`; what it gives to others is part of what a row leaves of 1.

        Raises TooFewIds where a row lacks ids, BadMessage where the answer is not what was asked for.
        """
        ids, logprobs, lacking = [], [], 0
        for text, first, given in zip(self.texts, self.firsts, self._given(said), strict=True):
            for place in range(first, len(text)):
                own, others = _numbers(given[place], text[place])
                others = sorted(((value, token) for token, value in others if token < size), reverse=True)
                lacking = max(lacking, self.k - 1 - len(others))
                ids.append([text[place], *(token for _, token in others[: self.k - 1])])
                logprobs.append([own, *(value for value, _ in others[: self.k - 1])])
        if lacking:
            raise TooFewIds(lacking)
        found = torch.tensor(logprobs, dtype=torch.float32).reshape(-1, self.k)
        if bool((found.double().exp().sum(1) > MOST).any()):
            raise BadMessage(
                "the numbers that the teacher sends are no log-probabilities: they add up to more than 1 (vLLM sends them with "
                "--logprobs-mode raw_logprobs, its default)"
            )
        return torch.tensor(ids, dtype=torch.int64).reshape(-1, self.k), found

    def _given(self, said: Mapping[str, Any]) -> list[list[Any]]:
        """The entries for all places of each text."""
        choices = said.get("choices")
        places = sorted(_index(one) for one in choices) if isinstance(choices, list) else None
        if places != list(range(len(self.texts))):
            answered = "none" if places is None else len(places)
            raise BadMessage(f"the teacher has answered {answered} of {len(self.texts)} texts")
        found = [one.get("prompt_logprobs") for one in sorted(choices, key=_index)]
        for text, given in zip(self.texts, found, strict=True):
            if given is None:
                raise BadMessage(
                    "the server answers without log-probabilities of the text that it was sent (prompt_logprobs), so that "
                    "nothing can be learned from it: vLLM gives them, servers of llama.cpp and SGLang do not"
                )
            if not isinstance(given, list) or len(given) != len(text):
                size = len(given) if isinstance(given, list) else "no list"
                raise BadMessage(f"the teacher has sent log-probabilities of {size} of {len(text)} tokens of a text")
        return found


def _index(choice: Any) -> int:
    index = choice.get("index") if isinstance(choice, dict) else None
    return index if type(index) is int else -1


def _numbers(entry: Any, token: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of a place's own token, and those of the other ids that are named there."""
    try:
        found = {int(name): float(one["logprob"]) for name, one in entry.items()}
        own = found.pop(token)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadMessage(
            f"the teacher has sent no log-probabilities of a token, id {token}, and of others at its place, but "
            f"{json.dumps(entry)[:200]}"
        ) from None
    if any(math.isnan(value) for value in (own, *found.values())):
        raise BadMessage("the teacher has sent log-probabilities that are no numbers (NaN)")
    return _finite(own), [(name, _finite(value)) for name, value in found.items()]


def _finite(value: float) -> float:
    return -math.inf if value <= IMPOSSIBLE else value
