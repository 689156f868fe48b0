"""One piece of work at a time, in a thread, with its error for the caller."""

import threading
import weakref

import pytest

from minillm.storage.background import BackgroundWork, is_at_work


class Gate:
    """Work that goes on when it is let, and remembers in which thread."""

    def __init__(self):
        self.opened, self.done_by = threading.Event(), None

    def __call__(self) -> None:
        assert self.opened.wait(60)
        self.done_by = threading.current_thread()


def failing() -> None:
    raise OSError(28, "full")


def test_the_caller_goes_on_and_waits_when_it_asks():
    work, gate = BackgroundWork(), Gate()
    work.start(gate)
    assert gate.done_by is None and is_at_work() and not work.failed
    gate.opened.set()
    work.finish()
    assert gate.done_by not in (None, threading.current_thread()) and not is_at_work() and not work.failed
    work.finish()  # nothing is left to wait for


def test_a_second_piece_waits_for_the_first():
    work, gate, order = BackgroundWork(), Gate(), []
    work.start(lambda: (gate(), order.append("first")))
    threading.Timer(0.05, gate.opened.set).start()
    work.start(lambda: order.append("second"))
    assert order[0] == "first"
    work.finish()
    assert order == ["first", "second"]


@pytest.mark.parametrize("ask", [BackgroundWork.finish, lambda work: work.start(lambda: None)])
def test_an_error_is_raised_by_whatever_is_called_next_and_once(ask):
    work = BackgroundWork()
    work.start(failing)
    work._worker.join()
    assert work.failed
    with pytest.raises(OSError, match="full"):
        ask(work)
    assert not work.failed
    work.finish()
    work.start(lambda: None)
    work.finish()


def test_what_the_work_holds_is_let_go_when_it_is_done():
    class Copy:
        def use(self) -> None:
            pass

    work, copy = BackgroundWork(), Copy()
    held = weakref.ref(copy)
    work.start(copy.use)
    del copy
    work._worker.join()
    assert held() is None
