"""The messages between a served teacher and its servers (minillm/serving): token ids go in as safetensors or as JSON, rows
and answers come out as safetensors."""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from minillm import UserError
from minillm.models.batch import TokenSequence

VERSION = 1  # of these messages
SAFETENSORS, JSON = "application/octet-stream", "application/json"
FINGERPRINT = "x-minillm-model"  # the header of every answer that says which weights gave it
Content = dict[str, Tensor]


class BadMessage(UserError):
    """A message that is not what it should be."""


@dataclass(frozen=True)
class RowsRequest:
    """Texts, and the form of the rows that are asked for: POST /rows?rows=...&k=...&pad_id=...&vocab_size=..."""

    sequences: tuple[TokenSequence, ...]
    rows: str = "hidden"  # or top_k
    k: int = 0  # ids a row, of top_k
    pad_id: int = 0  # stands beside the shorter texts
    vocab_size: int | None = None  # top_k: of the ids below it; None: of all

    @property
    def count(self) -> int:
        """The number of rows: response tokens."""
        return sum(len(one.response) for one in self.sequences)

    @property
    def longest(self) -> int:
        """Ids of the longest text, whose last is predicted and never read."""
        return max((len(one.prompt) + max(len(one.response), 1) - 1 for one in self.sequences), default=0)

    @property
    def query(self) -> dict[str, str]:
        """The part of the request that stands in its address."""
        asked = {"rows": self.rows, "k": self.k, "pad_id": self.pad_id, "vocab_size": self.vocab_size}
        return {name: str(value) for name, value in asked.items() if value is not None}

    @property
    def body(self) -> bytes:
        """The texts as safetensors: their ids one after the other, and the lengths of prompts and responses."""
        return save(
            {
                "ids": _ids([*one.prompt, *one.response] for one in self.sequences),
                "prompts": _lengths(one.prompt for one in self.sequences),
                "responses": _lengths(one.response for one in self.sequences),
            }
        )

    @classmethod
    def read(cls, query: Mapping[str, str], body: bytes, content_type: str) -> "RowsRequest":
        """The request that a client sent. Raises BadMessage, which says what is wrong with it."""
        numbers = {name: _number(name, query[name]) for name in ("k", "pad_id", "vocab_size") if name in query}
        rows = query.get("rows", "hidden")
        if rows not in ("hidden", "top_k"):
            raise BadMessage(f"rows is {rows!r}; expected hidden or top_k")
        if rows == "top_k" and numbers.get("k", 0) < 1:
            raise BadMessage("rows=top_k needs k, the number of ids a token, at least 1")
        texts = _texts_of_json(body) if content_type.startswith(JSON) else _texts_of_tensors(body)
        return cls(tuple(texts), rows, **numbers)


@dataclass(frozen=True)
class SampleRequest:
    """Prompts to be answered side by side, and the way: the JSON body of POST /sample."""

    prompts: list[list[int]]
    keys: list[int]  # of each prompt: with seed and draw it decides the noise
    seed: int
    draw: int
    sampling: dict[str, Any]  # fields of minillm.rollout.rollouts.Sampling
    eos_ids: list[int]
    pad_id: int
    vocab_size: int  # only ids below it are drawn

    @property
    def body(self) -> bytes:
        """The request as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def read(cls, body: bytes) -> "SampleRequest":
        """The request that a client sent. Raises BadMessage, which says what is wrong with it."""
        found = _json_object(body)
        fields = cls.__dataclass_fields__
        if set(found) != set(fields):
            raise BadMessage(f"expected the entries {', '.join(fields)}, not {', '.join(sorted(found)) or 'none'}")
        request = cls(**found)
        whole = [request.seed, request.draw, request.pad_id, request.vocab_size]
        lists = isinstance(request.prompts, list) and all(
            map(_is_ids, [*request.prompts, request.keys, request.eos_ids])
        )
        if not lists or not _is_ids(whole) or not isinstance(request.sampling, dict):
            raise BadMessage("prompts must be lists of ids, keys and eos_ids lists of numbers, sampling an object")
        if len(request.keys) != len(request.prompts) or not request.prompts:
            raise BadMessage(f"{len(request.prompts)} prompts and {len(request.keys)} keys; every prompt needs one")
        return request


def pack_answers(responses: Sequence[Sequence[int]], ended: Sequence[bool], logprobs: Sequence[Tensor]) -> bytes:
    """The body of the answer to /sample. `logprobs`: (T,) fp32 of each."""
    return save(
        {
            "ids": _ids(responses),
            "lengths": _lengths(responses),
            "ended": torch.tensor(list(ended), dtype=torch.bool),
            "logprobs": torch.cat([torch.empty(0), *logprobs]),
        }
    )


def unpack_answers(content: Content) -> list[tuple[list[int], bool, Tensor]]:
    """(ids, ended, log-probabilities) of every answer that `pack_answers` packed."""
    lengths = content["lengths"].tolist()
    ids, logprobs = content["ids"].split(lengths), content["logprobs"].split(lengths)
    return [
        (one.tolist(), ended, scores.clone())
        for one, ended, scores in zip(ids, content["ended"].tolist(), logprobs, strict=True)
    ]


def unpack(body: bytes) -> Content:
    """The tensors of a safetensors body. Raises BadMessage for anything else."""
    try:
        return load(body)
    except (SafetensorError, ValueError, KeyError, struct.error) as error:
        raise BadMessage(f"expected the bytes of a safetensors file ({error})") from None


def _texts_of_tensors(body: bytes) -> list[TokenSequence]:
    content = unpack(body)
    if set(content) != {"ids", "prompts", "responses"} or any(
        one.dim() != 1 or one.is_floating_point() or one.is_complex() for one in content.values()
    ):
        raise BadMessage("expected the tensors ids, prompts and responses, whole numbers of one dimension each")
    prompts, responses = content["prompts"].tolist(), content["responses"].tolist()
    lengths = [length for pair in zip(prompts, responses, strict=False) for length in pair]
    if len(prompts) != len(responses) or min(lengths, default=0) < 0 or sum(lengths) != len(content["ids"]):
        raise BadMessage(
            "prompts and responses must be the lengths of as many texts, together as many as there are ids"
        )
    parts = [part.tolist() for part in content["ids"].split(lengths)] if lengths else []
    return [TokenSequence(prompt, response) for prompt, response in zip(parts[::2], parts[1::2], strict=True)]


def _texts_of_json(body: bytes) -> list[TokenSequence]:
    found = _json_object(body)
    prompts, responses = found.get("prompts"), found.get("responses")
    if not all(isinstance(one, list) and all(map(_is_ids, one)) for one in (prompts, responses)):
        raise BadMessage('expected {"prompts": [[id, ...], ...], "responses": [[id, ...], ...]}')
    if len(prompts) != len(responses):
        raise BadMessage(f"{len(prompts)} prompts and {len(responses)} responses; every text needs both")
    return [TokenSequence(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"expected JSON ({error})") from None
    if not isinstance(found, dict):
        raise BadMessage("expected a JSON object")
    return found


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and abs(one) < 2**63 for one in value)


def _number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise BadMessage(f"{name} is {text[:40]!r}; expected a whole number")
    return int(text)


def _ids(parts) -> Tensor:  # of lists of ids -> (n,) int64
    return torch.tensor([token for part in parts for token in part], dtype=torch.int64)


def _lengths(parts) -> Tensor:  # -> (texts,) int64
    return torch.tensor([len(part) for part in parts], dtype=torch.int64)
