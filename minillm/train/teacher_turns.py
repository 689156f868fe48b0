"""The steps of a stage whose teachers are in memory one at a time: each reads the texts of a group of steps in its turn."""

from collections.abc import Callable, Sequence

import numpy as np

from minillm.methods.protocol import Item, Method, TrainingData
from minillm.rollout.rank_items import rank_items
from minillm.teachers.pair import Models
from minillm.teachers.several import takes_turns
from minillm.train.served_steps import Streams, unmoved


class TeacherTurns:
    """Counts the steps whose texts the teachers have read.

    Args:
        steps: of a group, as teachers_by.turn_steps says.
        order: the indices of a step's items from (number of items, draw + 1), as the trainer will choose them.
        cut: makes the micro-batches of a step.
    """

    def __init__(
        self,
        method: Method,
        data: TrainingData,
        models: Models,
        *,
        steps: int,
        order: Callable[[int, int], np.ndarray],
        cut: Callable[[Sequence[Item]], list[list[Item]]],
    ):
        self.method, self.data, self.models = method, data, models
        self.steps, self.order, self.cut = steps, order, cut
        read = any(term.teacher for term in method.needs.terms) and not method.needs.buffered
        self.applies = read and takes_turns(models.teacher)
        self._read = 0  # steps to come whose texts have been read

    def before(self, micro_batches: Sequence[Sequence[Item]], streams: Streams, *, draw: int, left: int | None) -> None:
        """Have the teachers read the texts of a step, and of those after it that are known, where they have not.

        Args:
            micro_batches: of the step.
            draw: of the next collection.
            left: steps after this one until the stage ends or is evaluated, where that is known.
        """
        if not self.applies:
            return
        if self._read:
            self._read -= 1
            return
        following = self.steps - 1 if left is None else min(self.steps - 1, left)
        group = list(micro_batches)
        with unmoved(streams):
            while self._read < following and self.method.foreseeable(draw):
                items = self.method.collect(self.data, self.models, draw)
                group += self.cut(rank_items(items, self.order(len(items), draw + 1)))
                self._read, draw = self._read + 1, draw + 1
        self.models.teacher.take_turns(self.method.teacher_batch(one, self.models) for one in group)
