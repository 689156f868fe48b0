"""Seconds of a run by what they were spent on, added up until they are read."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from minillm.distributed.waiting_time import waited

# rollout: sampling; scoring: batches, and passes without a gradient; update: forward, backward and optimiser;
# saving: copies, writing that is waited for, and waiting for the checkpoint before;
# communication: waiting for other ranks in any of these, whose own time is without it (minillm.distributed.waiting_time)
PARTS = ("rollout", "scoring", "update", "communication", "saving")


class Timing:
    """A stopwatch of this process. On a GPU a part ends where its results are read, so that none runs into the next."""

    def __init__(self):
        self._seconds: dict[str, float] = {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what runs inside as `part`, one of PARTS, and its waiting for other ranks as communication."""
        started, before = perf_counter(), waited()
        try:
            yield
        finally:
            waiting = waited() - before
            self._add(part, perf_counter() - started - waiting)
            if waiting:
                self._add("communication", waiting)

    def read(self) -> dict[str, float]:
        """{time/PART_s: seconds} since the last reading."""
        found = {f"time/{part}_s": self._seconds[part] for part in PARTS if part in self._seconds}
        self._seconds = {}
        return found

    def _add(self, part: str, seconds: float) -> None:
        self._seconds[part] = self._seconds.get(part, 0.0) + seconds
