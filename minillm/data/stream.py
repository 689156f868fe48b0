"""An endless, shuffled, resumable sequence of items."""

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from minillm import UserError

T = TypeVar("T")


class Stream(Generic[T]):
    """Every pass is a new permutation keyed by (seed, pass); the position is all the state there is.

    Raises UserError for an empty sequence.
    """

    def __init__(self, items: Sequence[T], *, seed: int):
        if not len(items):
            raise UserError("there is nothing to train on: no usable record was left after loading")
        self.items = items
        self.seed = seed
        self.taken = 0  # over all ranks
        self._order: tuple[int, np.ndarray] | None = None

    def take(self, n: int, rank: int = 0, world_size: int = 1) -> list[T]:
        """The rank's n of the next n * world_size items: what all ranks get together does not depend on their number."""
        first = self.taken
        self.taken += n * world_size
        return [self.items[self._index(first + rank * n + offset)] for offset in range(n)]

    def take_numbered(self, n: int) -> list[tuple[int, T]]:
        """The next n items with their places in the data: those of all ranks together, the same on every rank."""
        first = self.taken
        places = [self._index(first + offset) for offset in range(n)]
        return list(zip(places, self.take(n), strict=True))

    def _index(self, position: int) -> int:
        turn, offset = divmod(position, len(self.items))
        if self._order is None or self._order[0] != turn:
            self._order = (turn, np.random.default_rng([self.seed, turn]).permutation(len(self.items)))
        return int(self._order[1][offset])

    @property
    def passes(self) -> float:
        """The number of times that the items have been gone through."""
        return self.taken / len(self.items)

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken, "items": len(self.items)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Raises UserError where the data is not what the position was taken in."""
        if state["items"] != len(self.items):
            raise UserError(
                f"the checkpoint was made with {state['items']:,} records, but the data now has {len(self.items):,}; "
                "restore the data to go on from it"
            )
        self.taken = state["taken"]


class RankSlice(Generic[T]):
    """A stream of which a rank takes its part alone; all ranks take equally many at the same time."""

    def __init__(self, stream: Stream[T], *, rank: int, world_size: int):
        self.stream, self.rank, self.world_size = stream, rank, world_size

    def take(self, n: int) -> list[T]:
        """The rank's n of the next n * world_size items."""
        return self.stream.take(n, self.rank, self.world_size)

    def take_numbered(self, n: int) -> list[tuple[int, T]]:
        """The next n items of all ranks together with their places in the data, the same on every rank."""
        return self.stream.take_numbered(n)

    @property
    def items(self) -> Sequence[T]:
        return self.stream.items

    @property
    def passes(self) -> float:
        """The number of times that the items have been gone through, by all ranks together."""
        return self.stream.passes

    def state_dict(self) -> dict[str, int]:
        return self.stream.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.stream.load_state_dict(state)
