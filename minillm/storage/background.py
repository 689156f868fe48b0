"""Work that a thread does while its caller goes on: one piece at a time, whose error is the caller's."""

import threading
from collections.abc import Callable


class _Worker(threading.Thread):
    """Does one piece of work and keeps its error."""

    def __init__(self, work: Callable[[], None]):
        super().__init__(daemon=True)
        self._work: Callable[[], None] | None = work
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # the caller raises it
            self.error = error
        finally:
            self._work = None  # and with it the memory that it holds


class BackgroundWork:
    """See the module. Every method raises the error of a piece that has failed, once."""

    def __init__(self):
        self._worker: _Worker | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Have a thread do `work`, once the piece before it is done."""
        self.finish()
        self._worker = _Worker(work)
        self._worker.start()

    @property
    def failed(self) -> bool:
        """True once a piece has ended in an error that nobody has been told of."""
        return self._worker is not None and self._worker.error is not None

    def finish(self) -> None:
        """Wait until nothing is left to do."""
        if self._worker is None:
            return
        self._worker.join()
        error, self._worker = self._worker.error, None
        if error is not None:
            raise error


def is_at_work() -> bool:
    """True where a thread of this process is at such work: the interpreter is not to be torn down under it."""
    return bool(_workers())


def wait_for_all() -> None:
    """Wait for the work of this process that nobody waits for any more, where a second Ctrl-C ended what had begun it."""
    for worker in _workers():
        worker.join()


def _workers() -> list[_Worker]:
    return [thread for thread in threading.enumerate() if isinstance(thread, _Worker)]
