"""A teacher that `minillm serve` has in other processes; of its weights the head alone is here."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm import UserError
from minillm.config.models import ServedTeacherConfig
from minillm.losses import LMHead
from minillm.models.batch import TokenSequence
from minillm.teachers.cached import read_head
from minillm.teachers.minillm_servers import MinillmServers
from minillm.teachers.remote import RemoteTeacher
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


class ServedTeacher(RemoteTeacher):
    """The teacher of some servers of minillm; the protocol is minillm.teachers.teacher.Teacher.

    Args:
        device: of the student, where rows are put, and the head.

    Raises UserError where no server answers, and as MinillmServers does.
    """

    def __init__(self, config: ServedTeacherConfig, device: torch.device):
        super().__init__(config, device, MinillmServers(config))

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
        kind = "hidden states" if self.config.rows == "hidden" else f"{self.config.k} likeliest ids"
        passes = "" if self.described.get("batch_tokens") is None else ", passes shared"
        return f"served {self.described['architecture']}", self.servers, f"{kind} in {self.described['dtype']}{passes}"

    @property
    def identity(self) -> dict[str, Any]:
        return {key: self.described[key] for key in ("model", "dtype", "fingerprint")}

    def difference(self, before: Mapping[str, Any]) -> str | None:
        return None if before.get("fingerprint") == self.fingerprint else "has other weights"

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
        super().close()
        vars(self).pop("_head", None)

    def _asked(self, sequences: tuple[TokenSequence, ...], pad_id: int) -> _Asked:
        config, size = self.config, self.shared_ids
        top_k = {"k": config.k, "vocab_size": size} if config.rows == "top_k" else {}
        request = RowsRequest(sequences, config.rows, pad_id=pad_id, **top_k)
        return _Asked(request.body, tuple(request.query.items()), request.count)

    def _read(self, asked: _Asked) -> Content:
        body = self.pool.request("POST", "/rows", query=dict(asked.query), body=asked.body, content_type=SAFETENSORS)
        return self._checked(unpack(body), asked.count)

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
    pool = MinillmServers(config)
    for name, text in pool.read_json("/tokenizer").items():
        if Path(name).name != name or not name.endswith(TOKENIZER_FILES) or not isinstance(text, str):
            raise UserError(f"{' or '.join(config.urls)} sends {name!r}, which is no file of a tokenizer")
        (folder / name).write_text(text, encoding="utf-8")
    pool.close()
