"""Local teachers of which one's weights are in memory at a time.

Before a buffer is scored, a set is measured or a group of steps is taken, each of them reads all texts of its own that are
known to come, and gives way to the next. What stays of a teacher is its head, and its last hidden states of those texts in
the host's memory. A text that nobody foresaw has its teacher opened for it. The batches are those that a teacher in memory
would read, so that its rows are the same bit for bit.
"""

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minillm.config.needs import Ability
from minillm.losses import LMHead
from minillm.models.access import plain_head, row_hidden, without_id
from minillm.models.batch import TokenBatch
from minillm.models.device import moved, same_device
from minillm.models.families import answer_beside_pictures, placeholder_id, sees_pictures
from minillm.models.modes import sampling_mode
from minillm.models.other_device import head_to
from minillm.models.processors import processor_of
from minillm.models.tokenizers import end_ids
from minillm.teachers.row_cache import digest_of
from minillm.teachers.teacher import HiddenRows

ABILITIES: frozenset[Ability] = frozenset({"read", "logprobs"})  # of those of several that anybody asks for


class Turn:
    """The place in memory that the teachers of one stage share."""

    def __init__(self):
        self.holder: TeacherInTurn | None = None
        self.model: PreTrainedModel | None = None
        self.loads = 0  # of weights so far

    def take(self, teacher: "TeacherInTurn", load: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        """The weights of a teacher, in the place of another's."""
        if self.holder is not teacher:
            self.release()
            self.holder, self.model = teacher, load()
            self.loads += 1
        return self.model

    def release(self) -> None:
        """Give back the memory of whoever is in it."""
        if self.holder is None:
            return
        self.holder = self.model = None
        gc.collect()  # modules and their hooks refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class TeacherInTurn:
    """One of them; the protocol is minillm.teachers.teacher.Teacher.

    Args:
        load: opens its weights, the same every time, on a device that need not be the student's.
        look: is shown the model when it is opened for the first time, and raises where it is of no use.
    """

    model = None
    abilities = ABILITIES

    def __init__(
        self,
        load: Callable[[], PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        turn: Turn,
        *,
        look: Callable[[PreTrainedModel], None] = lambda model: None,
    ):
        self._load, self.turn = load, turn
        self._kept: dict[bytes, list[Tensor]] = {}  # batch -> (N, H_t) on the host, as often as it is to come
        self.answers_beside_pictures = False  # as minillm.models.families.answer_beside_pictures
        self.device: torch.device | None = None  # where rows and the head are given; None: where the weights are
        model = turn.take(self, load)
        look(model)
        self.end_ids = end_ids(model, tokenizer)
        self.picture_id = (
            placeholder_id(model.config) if sees_pictures(model) and processor_of(tokenizer) is not None else None
        )
        self.config = model.config
        self._summary = type(model).__name__, str(model.dtype).removeprefix("torch.")
        self._parameters = sum(one.numel() for one in model.parameters())
        self._head = head_to(plain_head(model), model.device)

    @property
    def vocab_size(self) -> int:
        """Rows of its head."""
        return len(self._head.weight)

    @property
    def row_form(self) -> tuple[int, torch.dtype]:
        """Columns and dtype of its hidden states."""
        return self._head.weight.shape[1], self._head.weight.dtype

    @property
    def summary(self) -> tuple[str, str, str]:
        """(name, size, form) for the preflight table."""
        name, dtype = self._summary
        return name, f"{self._parameters:,}", f"{dtype}, in memory in turn"

    @property
    def is_here(self) -> bool:
        """True while its weights are the ones in memory."""
        return self.turn.holder is self

    def give_to(self, device: torch.device) -> None:
        """Give rows and the head on this device from now on."""
        self.device, self._head = device, head_to(self._head, device)

    def take_turn(self, batches: Iterable[TokenBatch]) -> None:
        """Read the batches that `rows` is about to be called with, and keep what is said of them. What was kept before and
        is not among them is forgotten."""
        before, self._kept = self._kept, {}
        for batch in batches:
            name = _name(batch)
            known = self._kept.get(name) or before.get(name)
            rows = known[0] if known else self._read(batch).cpu()
            self._kept.setdefault(name, []).append(rows)

    def rows(self, batch: TokenBatch) -> HiddenRows:
        """The rows of a batch: those kept, or those of a forward pass, for which the weights are opened where they are not
        in memory."""
        name = _name(batch)
        kept = self._kept.get(name)
        if not kept:
            rows = self._read(batch)
            return HiddenRows(rows if self.device is None else moved(rows, self.device), self)
        rows = kept.pop()
        if not kept:
            del self._kept[name]
        return HiddenRows(moved(rows, batch.input_ids.device), self)

    def rows_of(self, parts: Mapping[str, Tensor]) -> HiddenRows:  # {"hidden": (N, H_t)}
        """Rows of what `parts` gave."""
        return HiddenRows(parts["hidden"], self)

    @contextmanager
    def head(self) -> Iterator[LMHead]:
        """The head, whole on every rank."""
        yield without_id(self._head, self.picture_id if self.answers_beside_pictures else None)

    def close(self) -> None:
        """Give back the weights, if they are in memory, and what was kept."""
        self._kept.clear()
        if self.is_here:
            self.turn.release()

    def _read(self, batch: TokenBatch) -> Tensor:  # (N, H_t)
        opened = not self.is_here
        model = self.turn.take(self, self._load)
        if opened and same_device(model.device, self._head.weight.device):  # one head in memory is enough
            self._head = head_to(plain_head(model), model.device)
        answer_beside_pictures(model, self.answers_beside_pictures)
        with sampling_mode([model]):
            return row_hidden(model, batch.read_by_teacher().to(model.device))


def _name(batch: TokenBatch) -> bytes:
    """Equal for batches of the same texts side by side: beside others a text's rows may differ in the last bit."""
    return b"".join(digest_of(sequence) for sequence in batch.sequences)
