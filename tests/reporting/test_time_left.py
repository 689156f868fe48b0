"""Time left, against a clock that the tests move."""

import pytest

from minillm.reporting.time_left import Limits, TimeLeft


class Stage:
    """Steps of so many seconds and tokens each; what is left after every one of them."""

    def __init__(self, limits: Limits, *, step: int = 0, seconds: float = 0.0, tokens: int = 0):
        self.step, self.clock, self.tokens = step, seconds, tokens
        self.left = TimeLeft(limits, resumed=step > 0)

    def take(self, seconds: float, tokens: int = 100) -> float | None:
        self.step, self.clock, self.tokens = self.step + 1, self.clock + seconds, self.tokens + tokens
        return self.left.after({"stage_step": self.step, "seconds": self.clock, "student_tokens": self.tokens})


def test_steps_go_on_at_the_pace_of_those_before():
    stage = Stage(Limits(steps=10))
    assert [stage.take(seconds) for seconds in (2.0, 4.0)] == [9 * 2.0, 8 * 3.0]


def test_seconds_are_left_by_the_clock_whatever_the_pace():
    stage = Stage(Limits(seconds=180.0))
    assert [stage.take(seconds) for seconds in (30.0, 90.0, 70.0)] == [150.0, 60.0, 0.0]


def test_tokens_are_left_at_their_own_pace():
    stage = Stage(Limits(student_tokens=1000))
    assert stage.take(2.0, tokens=100) == 18.0
    assert stage.take(2.0, tokens=300) == 600 / 100  # 400 tokens in 4 seconds
    assert stage.take(2.0, tokens=700) == 0.0  # past the limit, which ends the stage after its step


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        (Limits(steps=100_000, seconds=180.0), 170.0),  # the quickstart's last stage
        (Limits(steps=3, seconds=180.0), 20.0),
        (Limits(steps=100, student_tokens=300), 20.0),
        (Limits(steps=100, seconds=15.0, student_tokens=300), 5.0),
    ],
)
def test_the_limit_that_ends_first_counts(limits, left):
    assert Stage(limits).take(10.0, tokens=100) == left


def test_a_resumed_stage_does_not_count_what_was_before_in_its_pace():
    stage = Stage(Limits(steps=20, student_tokens=10_000), step=10, seconds=1000.0, tokens=1000)
    assert stage.take(5.0) is None  # nothing is known yet of how long a step takes
    assert stage.take(3.0) == 8 * 3.0
    by_the_clock = Stage(Limits(seconds=1100.0), step=10, seconds=1000.0)
    assert by_the_clock.take(5.0) == 95.0


def test_without_limits_nothing_is_known():
    assert Stage(Limits()).take(1.0) is None


def test_steps_without_tokens_leave_the_other_limits():
    assert Stage(Limits(steps=4, student_tokens=300)).take(1.0, tokens=0) == 3.0
