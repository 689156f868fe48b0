"""A teacher in other processes: `minillm serve` has its weights, and of them the head alone is here.

Rows are asked for when `rows` is called and waited for when they are needed, so that servers read the micro-batches to
come while the student trains on the one at hand.
"""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minillm import UserError
from minillm.config.models import ServedTeacherConfig
from minillm.config.needs import Ability
from minillm.losses import LMHead, TopK
from minillm.models.batch import TokenBatch
from minillm.teachers.cached import read_head
from minillm.teachers.server_pool import ServerPool
from minillm.teachers.teacher import HiddenRows, PromisedRows, TopKRows
from minillm.teachers.wire import (
    JSON,
    SAFETENSORS,
    BadMessage,
    Content,
    RowsRequest,
    SampleRequest,
    unpack,
    unpack_answers,
)

KINDS = {"hidden": ("hidden",), "top_k": ("ids", "logprobs")}  # of rows -> the tensors that a server sends
# Files of a tokenizer that a server may send; anything else is not written to this disk.
TOKENIZER_FILES = (".json", ".jinja", ".txt", ".model")
Answered = tuple[list[int], bool, Tensor]  # ids, whether it ended, (T,) log-probabilities


class _Asked(NamedTuple):
    """A request for rows as it is sent."""

    body: bytes
    query: tuple[tuple[str, str], ...]
    count: int


class ServedTeacher:
    """The teacher of some servers; the protocol is minillm.teachers.teacher.Teacher.

    Args:
        device: of the student, where rows are put, and the head.

    Raises UserError where no server answers, and as ServerPool does.
    """

    model = None
    picture_id = None  # texts alone

    def __init__(self, config: ServedTeacherConfig, device: torch.device):
        self.config, self.device, self.pool = config, device, ServerPool(config)
        self.abilities: frozenset[Ability] = config.abilities
        self.described = self.pool.described
        self._expected: dict[_Asked, PromisedRows] = {}
        self.shared_ids: int | None = None  # of the pair, once it is known

    @property
    def vocab_size(self) -> int:
        """Rows of its head."""
        return self.described["vocab_size"]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end its answers."""
        return tuple(self.described["end_ids"])

    @property
    def fingerprint(self) -> str:
        """Equal for equal weights: minillm.serving.served_model.weights_fingerprint."""
        return self.described["fingerprint"]

    @property
    def summary(self) -> tuple[str, str, str]:
        """(name, size, form) for the preflight table."""
        servers = f"{len(self.config.urls)} server{'s' if len(self.config.urls) > 1 else ''}"
        kind = "hidden states" if self.config.rows == "hidden" else f"{self.config.k} likeliest ids"
        passes = "" if self.described.get("batch_tokens") is None else ", passes shared"
        return f"served {self.described['architecture']}", servers, f"{kind} in {self.described['dtype']}{passes}"

    def rows(self, batch: TokenBatch) -> PromisedRows:
        """The rows of the batch's texts, which are asked for at once, or were by `expect`.

        Raises UserError for texts that show pictures.
        """
        asked = self._asked(batch)
        promised = self._expected.pop(asked, None)
        return self._ask(asked) if promised is None or promised.has_failed() else promised

    def expect(self, batches: Iterable[TokenBatch]) -> None:
        """Ask for the rows of batches that `rows` is about to be called with. What was expected before and did not come
        up is forgotten."""
        wanted = [self._asked(batch) for batch in batches]
        before = self._expected
        self._expected = {one: before[one] if one in before else self._ask(one) for one in wanted}

    def rows_of(self, parts: Mapping[str, Tensor]) -> HiddenRows | TopKRows:
        """Rows of {"hidden": (N, H)} or {"ids": (N, k), "logprobs": (N, k)}."""
        if "hidden" in parts:
            return HiddenRows(parts["hidden"], self)
        return TopKRows(TopK(parts["ids"], parts["logprobs"]))

    @contextmanager
    def head(self) -> Iterator[LMHead]:
        """The head, whole on every rank. Raises UserError for a teacher that gives likeliest ids."""
        if self.config.rows != "hidden":
            raise UserError("teacher.rows is top_k: there are no hidden states that a head could read")
        yield self._head

    def sample(self, requests: Sequence[SampleRequest]) -> Iterator[list[Answered]]:
        """The answers to each request, in their order; the servers work on several at a time."""
        promised = [
            self.pool.in_background(
                lambda request=request: self.pool.request("POST", "/sample", body=request.body, content_type=JSON)
            )
            for request in requests
        ]
        for request, one in zip(requests, promised, strict=True):
            answers = unpack_answers(unpack(one.result()))
            if len(answers) != len(request.prompts):
                raise BadMessage(f"the teacher has answered {len(answers)} of {len(request.prompts)} prompts")
            yield answers

    def close(self) -> None:
        self.pool.close()
        vars(self).pop("_head", None)

    def _asked(self, batch: TokenBatch) -> _Asked:
        if batch.extras:
            raise UserError("a served teacher reads texts alone, and these prompts show pictures")
        batch, config, size = batch.read_by_teacher(), self.config, self.shared_ids
        top_k = {"k": config.k, "vocab_size": size} if config.rows == "top_k" else {}
        request = RowsRequest(batch.sequences, config.rows, pad_id=_pad_id(batch), **top_k)
        if request.count != len(batch.rows):
            raise ValueError(
                f"a batch with {len(batch.rows)} rows must be of sequences with as many tokens of response"
            )
        return _Asked(request.body, tuple(request.query.items()), request.count)

    def _ask(self, asked: _Asked) -> PromisedRows:
        def ask() -> HiddenRows | TopKRows:
            body = self.pool.request(
                "POST", "/rows", query=dict(asked.query), body=asked.body, content_type=SAFETENSORS
            )
            return self.rows_of(self._checked(unpack(body), asked.count))

        return PromisedRows(self.pool.in_background(ask), asked.count, self.device)

    def _checked(self, content: Content, count: int) -> Content:
        """The tensors of an answer. Raises UserError where they are not what was asked for."""
        names = KINDS[self.config.rows]
        width = self.described["hidden_size"] if self.config.rows == "hidden" else self.config.k
        if set(content) != set(names) or any(tuple(one.shape) != (count, width) for one in content.values()):
            shapes = {name: tuple(one.shape) for name, one in content.items()}
            raise BadMessage(
                f"the teacher has sent {shapes} where {' and '.join(names)} of {(count, width)} were asked for"
            )
        return {name: one.long() if name == "ids" else one for name, one in content.items()}

    @cached_property
    def _head(self) -> LMHead:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "head.safetensors"
            path.write_bytes(self.pool.request("GET", "/head"))
            return read_head(path, self.device)


def fetch_tokenizer(config: ServedTeacherConfig, folder: Path) -> None:
    """Write the files of a served teacher's tokenizer into a folder.

    Raises UserError where no server answers, and for a name that is none of a tokenizer's files.
    """
    pool = ServerPool(config)
    for name, text in pool.read_json("/tokenizer").items():
        if Path(name).name != name or not name.endswith(TOKENIZER_FILES) or not isinstance(text, str):
            raise UserError(f"{' or '.join(config.urls)} sends {name!r}, which is no file of a tokenizer")
        (folder / name).write_text(text, encoding="utf-8")
    pool.close()


def _pad_id(batch: TokenBatch) -> int:
    padding = batch.input_ids[batch.attention_mask == 0]
    return int(padding[0]) if len(padding) else 0
