"""Several teachers of one student: each judges records of its own, or all judge every record, with weights.

With weights w_i that sum to 1 a row's loss is sum_i w_i D(p_i, q), the objective of distillation from several teachers
(You et al., "Learning from Multiple Teacher Networks", KDD 2017, for the cross-entropy and equal weights). For the forward KL
it is KL(sum_i w_i p_i || q) and a constant; for the reverse KL it is KL(q || p) and a constant, p the normalised geometric
mean prod_i p_i^w_i: the gradients are those of one teacher with these distributions.

A loss takes the word of each teacher by itself, a `Share`, on the rows that are its: one forward pass of the student serves
all of them, and their sum is divided as the loss of one teacher is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm import UserError
from minillm.config.needs import Ability
from minillm.losses import LMHead
from minillm.models.batch import TokenBatch, collate
from minillm.models.sharded import is_sharded
from minillm.teachers.in_turn import TeacherInTurn
from minillm.teachers.remote import RemoteTeacher
from minillm.teachers.teacher import Teacher, TeacherRows

if TYPE_CHECKING:
    from minillm.losses import TopK

JUDGE = "judge"  # the part of rows that says whose each is: a place in the order of the teachers' names


@dataclass(frozen=True)
class Share:
    """The word of one teacher on some of N rows, or on all of them, and its weight in what is said of these."""

    rows: TeacherRows | None  # M rows; None where there are none, and where no teacher is asked
    teacher: Teacher | None = None  # whose head all ranks read together, whoever has rows of it
    places: Tensor | None = None  # (M,) int64, which of the N rows they are; None: all
    weight: float = 1.0

    def of(self, values: Tensor) -> Tensor:  # (N, ...) -> (M, ...)
        """The part of per-row values that this share is about."""
        return values if self.places is None else values[self.places]

    @property
    def is_empty(self) -> bool:
        """True for a teacher that has no rows of these."""
        return self.places is not None and len(self.places) == 0

    @contextmanager
    def for_losses(self) -> Iterator[tuple["Tensor | TopK | None", LMHead | None]]:
        """The teacher's side of the losses, (None, None) without one. All ranks enter and leave together."""
        if self.rows is not None:
            with self.rows.for_losses() as both:
                yield both
        else:  # the head of a sharded teacher is gathered by all ranks, those without rows of it too
            with self.teacher.head() if self.teacher and is_sharded(self.teacher.model) else nullcontext():
                yield None, None


@dataclass(frozen=True)
class SeveralRows:
    """The word of several teachers on N rows, teacher by teacher in the order of their names."""

    shares: tuple[Share, ...]
    source: "SeveralTeachers"
    count: int

    def __len__(self) -> int:
        return self.count

    def to(self, device: torch.device | str) -> "SeveralRows":
        shares = (
            replace(
                share,
                rows=None if share.rows is None else share.rows.to(device),
                places=None if share.places is None else share.places.to(device),
            )
            for share in self.shares
        )
        return replace(self, shares=tuple(shares))

    def parts(self) -> dict[str, Tensor]:  # (N, ...) each
        """The tensors that a buffer keeps; `Teacher.rows_of` makes rows of them again."""
        return self.source.parts(self)

    def for_losses(self) -> AbstractContextManager:
        """Raises UserError: each share has a side of its own. Who takes several teachers declares it (TermNeeds.shared)."""
        raise UserError(
            "the words of several teachers were taken for those of one, which this method does not declare it can"
        )


class SeveralTeachers:
    """See the module; the protocol is minillm.teachers.teacher.Teacher.

    Args:
        teachers: by their names.
        weights: of a mixture, which sum to 1; None where every sequence names its own.
        abilities: what they can do together, as minillm.config.models.SeveralTeachersConfig has it.
    """

    model: PreTrainedModel | None = None  # there is not one

    def __init__(
        self, teachers: Mapping[str, Teacher], weights: Mapping[str, float] | None, abilities: frozenset[Ability]
    ):
        self.teachers = {name: teachers[name] for name in sorted(teachers)}
        self.weights = weights
        self.abilities = abilities.intersection(*(one.abilities for one in teachers.values()))

    @property
    def vocab_size(self) -> int:
        """Ids that all of them speak of."""
        return min(one.vocab_size for one in self.teachers.values())

    def rows(self, batch: TokenBatch) -> SeveralRows:
        """The word of each teacher on its part of a batch, or on all of it.

        Raises UserError where each sequence is one teacher's and one names none of them.
        """
        if self.weights is not None:
            shares = (Share(one.rows(batch), one, weight=self.weights[name]) for name, one in self.teachers.items())
            return SeveralRows(tuple(shares), self, len(batch.rows))
        shares = []
        for name, sequences in self._divided(batch).items():
            teacher = self.teachers[name]
            places = _rows_of(batch, sequences)
            part = batch if len(sequences) == len(batch.sequences) else _part(batch, sequences)
            if sequences:
                shares.append(Share(teacher.rows(part), teacher, places))
                continue
            if is_sharded(teacher.model):  # every rank takes part in its forward pass
                teacher.rows(_part(batch, [0]))
            shares.append(Share(None, teacher, places))
        return SeveralRows(tuple(shares), self, len(batch.rows))

    def parts(self, rows: SeveralRows) -> dict[str, Tensor]:  # (N, ...) each
        """The parts of rows of these teachers. With weights NAME.PART of each; else one of each kind, as wide as the widest
        teacher needs and in a dtype that holds that of every one, and `judge`, whose each row is."""
        if self.weights is not None:
            return {
                f"{name}.{part}": tensor
                for (name, share) in zip(self.teachers, rows.shares, strict=True)
                for part, tensor in share.rows.parts().items()
            }
        device = rows.shares[0].places.device
        found = {JUDGE: torch.zeros(len(rows), dtype=torch.int64, device=device)}
        for part, (width, dtype) in self._widest().items():
            found[part] = torch.zeros(len(rows), width, dtype=dtype, device=device)
        for number, (teacher, share) in enumerate(zip(self.teachers.values(), rows.shares, strict=True)):
            found[JUDGE][share.places] = number
            if share.rows is None:
                continue
            form = row_form(teacher)
            for part, tensor in share.rows.parts().items():
                if (tensor.shape[1], tensor.dtype) != form.get(part):
                    raise ValueError(f"rows of {part} are {tuple(tensor.shape)} {tensor.dtype}, expected {form}")
                found[part][share.places, : tensor.shape[1]] = tensor.to(device, found[part].dtype)
        return found

    def rows_of(self, parts: Mapping[str, Tensor]) -> SeveralRows:  # (N, ...) each
        """Rows of what `parts` gave."""
        count = len(next(iter(parts.values())))
        shares = []
        for number, (name, teacher) in enumerate(self.teachers.items()):
            if self.weights is not None:
                own = {key.partition(".")[2]: one for key, one in parts.items() if key.partition(".")[0] == name}
                shares.append(Share(teacher.rows_of(own), teacher, weight=self.weights[name]))
                continue
            places = (parts[JUDGE] == number).nonzero()[:, 0]
            own = {part: parts[part][places, :width].to(dtype) for part, (width, dtype) in row_form(teacher).items()}
            shares.append(Share(teacher.rows_of(own) if len(places) else None, teacher, places))
        return SeveralRows(tuple(shares), self, count)

    def expect(self, batches: Iterable[TokenBatch]) -> None:
        """Tell those that are served which batches `rows` is about to be called with."""
        batches = list(batches)
        for name, teacher in self.teachers.items():
            if isinstance(teacher, RemoteTeacher):
                teacher.expect(batches if self.weights is not None else self._own_parts(batches, name))

    @property
    def in_turn(self) -> dict[str, TeacherInTurn]:
        """Those of which one is in memory at a time, by their names, the one that is there first."""
        found = {name: one for name, one in self.teachers.items() if isinstance(one, TeacherInTurn)}
        return dict(sorted(found.items(), key=lambda named: not named[1].is_here))

    def take_turns(self, batches: Iterable[TokenBatch]) -> None:
        """Have those of which one is in memory at a time read, one after the other, the batches that `rows` is about to be
        called with."""
        batches = list(batches)
        for name, teacher in self.in_turn.items():
            teacher.take_turn(batches if self.weights is not None else self._own_parts(batches, name))

    def head(self) -> AbstractContextManager[LMHead]:
        """Raises UserError: each has one of its own."""
        raise UserError("several teachers have several heads, and one was asked for")

    def close(self) -> None:
        for teacher in self.teachers.values():
            teacher.close()

    def _own_parts(self, batches: Sequence[TokenBatch], name: str) -> Iterator[TokenBatch]:
        for batch in batches:
            sequences = self._divided(batch)[name]
            if sequences:
                yield batch if len(sequences) == len(batch.sequences) else _part(batch, sequences)

    def _divided(self, batch: TokenBatch) -> dict[str, list[int]]:
        """Teacher -> the places of its sequences in a batch."""
        if sum(len(sequence.response) for sequence in batch.sequences) != len(batch.rows):
            raise ValueError(
                f"a batch with {len(batch.rows)} rows must be of sequences with as many tokens of response"
            )
        divided: dict[str, list[int]] = {name: [] for name in self.teachers}
        for place, sequence in enumerate(batch.sequences):
            if sequence.judge not in divided:
                raise UserError(
                    f"the text with key {sequence.key} has {sequence.judge!r} for its teacher; the teachers are "
                    f"{', '.join(self.teachers)}"
                )
            divided[sequence.judge].append(place)
        return divided

    def _widest(self) -> dict[str, tuple[int, torch.dtype]]:
        """Part -> the width and the dtype in which the rows of every teacher have room."""
        forms: dict[str, list[tuple[int, torch.dtype]]] = {}
        for teacher in self.teachers.values():
            for part, form in row_form(teacher).items():
                forms.setdefault(part, []).append(form)
        return {
            part: (max(width for width, _ in found), reduce(torch.promote_types, [dtype for _, dtype in found]))
            for part, found in forms.items()
        }


def row_form(teacher: Teacher) -> dict[str, tuple[int, torch.dtype]]:
    """The columns and the dtype of the parts of a teacher's rows."""
    if isinstance(teacher, RemoteTeacher):
        if teacher.config.rows == "top_k":
            return {"ids": (teacher.config.k, torch.int64), "logprobs": (teacher.config.k, torch.float32)}
        return {"hidden": (teacher.described["hidden_size"], getattr(torch, teacher.described["dtype"]))}
    if isinstance(teacher, TeacherInTurn):
        return {"hidden": teacher.row_form}
    weight = teacher.model.get_output_embeddings().weight
    return {"hidden": (getattr(weight, "ds_shape", weight.shape)[1], weight.dtype)}


def members(teacher: Teacher | None) -> dict[str | None, Teacher]:
    """Several teachers by their names, the one that there is by None, or none."""
    if isinstance(teacher, SeveralTeachers):
        return dict(teacher.teachers)
    return {} if teacher is None else {None: teacher}


def takes_turns(teacher: Teacher | None) -> bool:
    """True for several teachers of which one is in memory at a time."""
    return isinstance(teacher, SeveralTeachers) and bool(teacher.in_turn)


def weights_here(teacher: Teacher | None) -> list[PreTrainedModel]:
    """The models of a teacher, or of several, whose weights lie in this process."""
    return [one.model for one in members(teacher).values() if one.model is not None]


def shares_of(rows: "TeacherRows | SeveralRows | None") -> tuple[Share, ...]:
    """The words on N rows, teacher by teacher; one share of all rows where there is one teacher, or none is asked."""
    return rows.shares if isinstance(rows, SeveralRows) else (Share(rows),)


def _rows_of(batch: TokenBatch, sequences: Sequence[int]) -> Tensor:  # (M,) int64
    """The rows of some sequences of a batch, among its N."""
    rows = torch.arange(len(batch.rows), device=batch.rows.device).split(batch.lengths)
    return torch.cat([rows[place] for place in sequences]) if sequences else batch.rows[:0]


def _part(batch: TokenBatch, sequences: Sequence[int]) -> TokenBatch:
    """Some sequences of a batch, in that order, as a batch of their own."""
    return collate([batch.sequences[place] for place in sequences], batch.pad_id).to(batch.input_ids.device)
