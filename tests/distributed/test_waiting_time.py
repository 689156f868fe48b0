"""Seconds in a collective's wait, on a clock that the test winds."""

import pytest
import torch.distributed as dist

from minillm.distributed import waiting_time


@pytest.fixture
def work(monkeypatch):
    """A function that waits so long in a collective, in the place of torch's."""
    now = [0.0]

    class Work:
        def wait(self, seconds: float) -> str:
            now[0] += seconds
            if seconds < 0.5:
                raise RuntimeError("connection closed by peer")
            return "done"

    monkeypatch.setattr(waiting_time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(waiting_time, "_seconds", 0.0)
    monkeypatch.setattr(waiting_time, "_counting", False)
    monkeypatch.setattr(dist, "Work", Work)
    return lambda seconds: Work().wait(seconds)


def test_waits_add_up_once_they_are_counted(work):
    work(5.0)
    assert waiting_time.waited() == 0
    waiting_time.count_waits()
    waiting_time.count_waits()  # by another run of this process: every second still counts once
    assert work(2.0) == "done"
    with pytest.raises(RuntimeError, match="closed"):
        work(0.25)
    assert waiting_time.waited() == 2.25
