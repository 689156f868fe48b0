"""The steps of a stage whose teacher is served elsewhere: its rows are asked for ahead, and where it stays away the stage
goes back to its last whole step."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.data.stream import RankSlice, Stream
from minillm.distributed import collectives
from minillm.methods.protocol import Item, Method, Term, TrainingData
from minillm.rollout.buffer import RolloutBuffer
from minillm.rollout.rank_items import rank_items
from minillm.teachers.pair import Models
from minillm.teachers.remote import RemoteTeacher
from minillm.teachers.server_pool import TeacherAway
from minillm.teachers.several import members, shares_of
from minillm.teachers.teacher import PromisedRows, Teacher
from minillm.train.progress import Progress

Streams = Mapping[str, Stream | RankSlice]
Items = Sequence[Item] | RolloutBuffer


@dataclass(frozen=True)
class Moment:
    """Everything that collecting and asking change before a step is taken."""

    items: Items
    progress: dict[str, int]
    streams: dict[str, dict[str, int]]
    method: dict[str, Any]

    @classmethod
    def of(cls, items: Items, progress: Progress, streams: Streams, method: Method) -> "Moment":
        """The moment before a step."""
        return cls(
            items,
            {name: getattr(progress, name) for name in ("draw", "epoch", "position")},
            {name: stream.state_dict() for name, stream in streams.items()},
            copy.deepcopy(method.state_dict()),
        )

    def restore(self, progress: Progress, streams: Streams, method: Method) -> Items:
        """Go back to it; returns the items that were being stepped through."""
        for name, value in self.progress.items():
            setattr(progress, name, value)
        for name, stream in streams.items():
            stream.load_state_dict(self.streams[name])
        if self.method:
            method.load_state_dict(self.method)
        return self.items


def made_together(make: Callable[[], list[list[Term]]], *, served: bool) -> list[list[Term]]:
    """The terms of a step. On several ranks a served teacher's rows are waited for, so that all take the step or none does.

    Raises TeacherAway on every rank where it stays away from one.
    """
    if collectives.world_size() == 1 or not served:
        return make()
    terms, away = [], None
    try:
        terms = make()
        for term in (one for of_micro_batch in terms for one in of_micro_batch):
            asked = [share.rows for share in shares_of(term.teacher)]
            for rows in (*asked, *([] if term.heads is None else [term.heads.teacher])):
                if isinstance(rows, PromisedRows):
                    rows.wait()
    except TeacherAway as error:
        away = str(error)
    others = [one for one in collectives.gather(away) if one is not None]
    if others:
        raise TeacherAway(others[0], everywhere=True)
    return terms


def ask_ahead(
    method: Method,
    data: TrainingData,
    models: Models,
    streams: Streams,
    *,
    draw: int,
    order: Callable[[int, int], np.ndarray],
    cut: Callable[[Sequence[Item]], list[list[Item]]],
) -> None:
    """Ask for the rows of the next step, while this one is taken, where it is known what that will be of.

    Args:
        draw: of the next collection.
        order: the indices of a step's items from (number of items, draw + 1), as the trainer will choose them.
        cut: makes the micro-batches of a step, whose items are asked for together.
    """
    if not is_served(models.teacher) or not any(term.teacher for term in method.needs.terms):
        return
    if method.needs.buffered or not method.foreseeable(draw):
        return
    with unmoved(streams):
        items = method.collect(data, models, draw)
    mine = rank_items(items, order(len(items), draw + 1))
    models.teacher.expect(method.teacher_batch(micro_batch, models) for micro_batch in cut(mine))


def is_served(teacher: Teacher | None) -> bool:
    """True for a teacher that is served elsewhere, and for several of which one is."""
    return any(isinstance(one, RemoteTeacher) for one in members(teacher).values())


@contextmanager
def unmoved(streams: Streams) -> Iterator[None]:
    """Streams that are taken from meanwhile stand where they stood afterwards."""
    before = {name: stream.state_dict() for name, stream in streams.items()}
    try:
        yield
    finally:
        for name, stream in streams.items():
            stream.load_state_dict(before[name])
