"""A teacher in other processes: its rows are asked for when `rows` is called and waited for when they are needed, so that
servers read the micro-batches to come while the student trains on the one at hand."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from minillm import UserError
from minillm.config.models import ServedTeacherConfig
from minillm.config.needs import Ability
from minillm.losses import TopK
from minillm.models.batch import TokenBatch, TokenSequence
from minillm.teachers.server_pool import ServerPool
from minillm.teachers.teacher import HiddenRows, PromisedRows, TopKRows


class Asked(Protocol):
    """A request for rows: hashable, and equal to another one for the same rows."""

    count: int  # of rows


class RemoteTeacher(ABC):
    """The common part of all teachers that servers have; the protocol is minillm.teachers.teacher.Teacher.

    A subclass says how rows are asked for (`_asked`) and read (`_read`), which model it is (`identity`), and the rest of the
    protocol.

    Args:
        device: of the student, where rows are put.
    """

    model = None
    picture_id = None  # texts alone

    def __init__(self, config: ServedTeacherConfig, device: torch.device, pool: ServerPool):
        self.config, self.device, self.pool = config, device, pool
        self.abilities: frozenset[Ability] = config.abilities
        self.described = pool.described
        self._expected: dict[Asked, PromisedRows] = {}
        self.shared_ids: int | None = None  # of the pair, once it is known

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """The model that is served, in words that JSON knows, for `difference` and for people."""

    @abstractmethod
    def difference(self, before: Mapping[str, Any]) -> str | None:
        """The way in which the model differs from the one that had this `identity`; None where it is the same."""

    def require_length(self, name: str, longest: int) -> None:  # noqa: B027 (most know of no limit)
        """Raises UserError for texts, which `name` names, that have more ids than any server reads, where that is known."""

    def rows(self, batch: TokenBatch) -> PromisedRows:
        """The rows of the batch's texts, which are asked for at once, or were by `expect`.

        Raises UserError for texts that show pictures.
        """
        asked = self._asked_of(batch)
        promised = self._expected.pop(asked, None)
        return self._ask(asked) if promised is None or promised.has_failed() else promised

    def expect(self, batches: Iterable[TokenBatch]) -> None:
        """Ask for the rows of batches that `rows` is about to be called with. What was expected before and did not come
        up is forgotten."""
        wanted = [self._asked_of(batch) for batch in batches]
        before = self._expected
        self._expected = {one: before[one] if one in before else self._ask(one) for one in wanted}

    def rows_of(self, parts: Mapping[str, Tensor]) -> HiddenRows | TopKRows:
        """Rows of {"hidden": (N, H)} or {"ids": (N, k), "logprobs": (N, k)}."""
        if "hidden" in parts:
            return HiddenRows(parts["hidden"], self)
        return TopKRows(TopK(parts["ids"], parts["logprobs"]))

    def close(self) -> None:
        self.pool.close()

    @property
    def servers(self) -> str:
        """Their number, for the preflight table."""
        return f"{len(self.config.urls)} server{'s' if len(self.config.urls) > 1 else ''}"

    @abstractmethod
    def _asked(self, sequences: tuple[TokenSequence, ...], pad_id: int) -> Asked:
        """The request for the rows of some texts."""

    @abstractmethod
    def _read(self, asked: Asked) -> dict[str, Tensor]:  # (N, ...) each, as rows_of takes them
        """The rows that servers answer with; called in a thread of its own."""

    def _asked_of(self, batch: TokenBatch) -> Asked:
        if batch.extras:
            raise UserError("a served teacher reads texts alone, and these prompts show pictures")
        batch = batch.read_by_teacher()
        asked = self._asked(batch.sequences, batch.pad_id)
        if asked.count != len(batch.rows):
            raise ValueError(
                f"a batch with {len(batch.rows)} rows must be of sequences with as many tokens of response"
            )
        return asked

    def _ask(self, asked: Asked) -> PromisedRows:
        promised = self.pool.in_background(lambda: self.rows_of(self._read(asked)))
        return PromisedRows(promised, asked.count, self.device)
