"""The protocol of a teacher: rows for the losses, and whatever else a source can do.

A teacher says something about N rows, the predictions of a batch that count. `HiddenRows` are its last hidden states,
from which the losses compute its full distribution; `TopK` rows are its k likeliest ids. The losses take either. A teacher
elsewhere promises rows, and whoever needs them waits.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm import UserError
from minillm.config.needs import ABILITIES, Ability
from minillm.losses import LMHead
from minillm.models.batch import TokenBatch
from minillm.models.device import moved

if TYPE_CHECKING:
    from minillm.losses import TopK


@dataclass(frozen=True)
class HiddenRows:
    """The last hidden states of a teacher at N rows, and whose they are."""

    hidden: Tensor  # (N, H_t), in the teacher's dtype
    source: "Teacher"  # its head turns them into logits

    def __len__(self) -> int:
        return len(self.hidden)

    def to(self, device: torch.device | str) -> "HiddenRows":
        return replace(self, hidden=moved(self.hidden, device))

    def parts(self) -> dict[str, Tensor]:  # (N, ...) each
        """The tensors that a buffer keeps; `Teacher.rows_of` makes rows of them again."""
        return {"hidden": self.hidden}

    @contextmanager
    def for_losses(self) -> Iterator[tuple[Tensor, LMHead]]:
        """The teacher's side of the losses: hidden states and head, which is gathered while the context is open.

        All ranks enter and leave together.
        """
        with self.source.head() as head:
            yield self.hidden, head


@dataclass(frozen=True)
class TopKRows:
    """The teacher's word on N rows by its k likeliest ids."""

    top_k: "TopK"  # ids and log-probabilities, (N, k) each

    def __len__(self) -> int:
        return len(self.top_k.ids)

    def to(self, device: torch.device | str) -> "TopKRows":
        ids, logprobs = (moved(part, device) for part in (self.top_k.ids, self.top_k.logprobs))
        return TopKRows(type(self.top_k)(ids, logprobs))

    def parts(self) -> dict[str, Tensor]:  # (N, k) each
        """The tensors that a buffer keeps; `Teacher.rows_of` makes rows of them again."""
        return {"ids": self.top_k.ids, "logprobs": self.top_k.logprobs}

    @contextmanager
    def for_losses(self) -> Iterator[tuple["TopK", None]]:
        """The teacher's side of the losses."""
        yield self.top_k, None


@dataclass(frozen=True)
class PromisedRows:
    """The word on N rows of a teacher that is still reading them elsewhere. Every use waits for it, and raises what went wrong
    there."""

    promised: "Future[HiddenRows | TopKRows]"
    count: int
    device: torch.device  # of the student

    def __len__(self) -> int:
        return self.count

    def wait(self) -> HiddenRows | TopKRows:
        """The rows, on the host."""
        return self.promised.result()

    def has_failed(self) -> bool:
        """True where it is known that they will not come."""
        return self.promised.done() and self.promised.exception() is not None

    def to(self, device: torch.device | str) -> HiddenRows | TopKRows:
        return self.wait().to(device)

    def parts(self) -> dict[str, Tensor]:  # (N, ...) each
        """The tensors that a buffer keeps; `Teacher.rows_of` makes rows of them again."""
        return self.to(self.device).parts()

    @contextmanager
    def for_losses(self) -> Iterator[tuple["Tensor | TopK", LMHead | None]]:
        """The teacher's side of the losses."""
        with self.to(self.device).for_losses() as both:
            yield both


TeacherRows = HiddenRows | TopKRows | PromisedRows


class Teacher(Protocol):
    """A source of rows."""

    abilities: frozenset[Ability]  # beyond rows
    model: PreTrainedModel | None  # where its weights lie in this process
    vocab_size: int  # ids that it speaks of

    def rows(self, batch: TokenBatch) -> TeacherRows:
        """The teacher's word on the N rows of a batch, on the device of the student, without a gradient. Where sequences have
        a prompt for the teacher it reads that one, `TokenBatch.read_by_teacher`."""

    def rows_of(self, parts: Mapping[str, Tensor]) -> TeacherRows:  # (N, ...) each
        """Rows of the tensors that `TeacherRows.parts` gave earlier."""

    def head(self) -> AbstractContextManager[LMHead]:
        """The head of its hidden states. UserError for a source without hidden states."""

    def close(self) -> None:
        """Give back its memory. All ranks together; it is of no use afterwards."""


def require_teacher(teacher: Teacher | None, what: str) -> None:
    """Raises UserError where there is no teacher. `what` says who asks."""
    if teacher is None:
        raise UserError(f"{what} needs a teacher, and there is none; configure `teacher`")


def require_ability(teacher: Teacher | None, ability: Ability, what: str) -> None:
    """Raises UserError where there is no teacher, or one that cannot do what is asked. `what` says who asks."""
    require_teacher(teacher, what)
    if ability not in teacher.abilities:
        raise UserError(
            f"{what} needs a teacher that can {ABILITIES[ability]}, which {type(teacher).__name__} cannot; use one whose "
            "weights are here, and no other beside it"
        )
