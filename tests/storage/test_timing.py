"""Seconds by part, on a clock that the test winds."""

import pytest

from minillm.storage import timing


def test_parts_add_up_until_they_are_read(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    clock = timing.Timing()
    for part, seconds in (("update", 2.0), ("rollout", 3.0), ("update", 0.5)):
        with clock.of(part):
            now[0] += seconds
    with pytest.raises(ValueError), clock.of("saving"):
        now[0] += 1.0
        raise ValueError
    assert clock.read() == {"time/rollout_s": 3.0, "time/update_s": 2.5, "time/saving_s": 1.0}
    assert clock.read() == {}


def test_waiting_for_other_ranks_is_nobody_elses_time(monkeypatch):
    now, waits = [0.0], [5.0]
    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "waited", lambda: waits[0])
    clock = timing.Timing()
    for part in ("rollout", "update"):
        with clock.of(part):
            now[0] += 3.0
            waits[0] += 1.0
    waits[0] += 7.0  # outside all parts
    assert clock.read() == {"time/rollout_s": 2.0, "time/update_s": 2.0, "time/communication_s": 2.0}
