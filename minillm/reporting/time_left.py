"""The time that a stage still has, by whichever of its limits it reaches first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """The limits of a stage, None where there is none. The one that is reached first ends it."""

    steps: int | None = None
    seconds: float | None = None  # of training, evaluation and saving not counted
    student_tokens: int | None = None


class TimeLeft:
    """The seconds until a stage ends, from its records, each with `stage_step`, `seconds` and `student_tokens`."""

    def __init__(self, limits: Limits, *, resumed: bool):
        """`resumed`: the stage goes on from a checkpoint, so that its rates count from its next record on."""
        self.limits = limits
        self._began: Mapping[str, Any] | None = None
        if not resumed:
            self._began = {"stage_step": 0, "seconds": 0.0, "student_tokens": 0}

    def after(self, record: Mapping[str, Any]) -> float | None:
        """Return the seconds that are left after a step; None where nothing is known of them yet."""
        if self._began is None:
            self._began = record
        limits = self.limits
        left = [
            self._at_this_rate(record, "stage_step", limits.steps),
            self._at_this_rate(record, "student_tokens", limits.student_tokens),
        ]
        if limits.seconds is not None:
            left.append(max(0.0, limits.seconds - record["seconds"]))
        return min((one for one in left if one is not None), default=None)

    def _at_this_rate(self, record: Mapping[str, Any], name: str, limit: int | None) -> float | None:
        if limit is None or record[name] <= self._began[name]:
            return None
        pace = (record["seconds"] - self._began["seconds"]) / (record[name] - self._began[name])
        return max(0.0, pace * (limit - record[name]))
