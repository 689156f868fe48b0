"""The progress of a run: what a checkpoint says beside weights, optimiser and buffer."""

from dataclasses import field
from typing import Any

from pydantic import ConfigDict, NonNegativeInt
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict


class Best(TypedDict):
    """The model of a stage that is kept in best/, by the metric it was chosen by."""

    metric: str
    value: float
    step: int
    stage: str


class Position(TypedDict):
    """The place in a stream of data."""

    taken: NonNegativeInt
    items: NonNegativeInt


@dataclass(config=ConfigDict(strict=True, extra="forbid"))
class Progress:
    """The progress of a run. Together with the weights, engine.pt and the buffer this is all that resuming needs.

    Raises pydantic.ValidationError where it is made of other values: a checkpoint is read into it.
    """

    stage: str
    step: NonNegativeInt = 0  # over all stages
    stage_step: NonNegativeInt = 0
    draw: NonNegativeInt = 0  # collections so far
    epoch: NonNegativeInt = 0  # of the current collection
    position: NonNegativeInt = 0  # items of this epoch already used
    seconds: float = 0.0  # training time of this stage, without evaluation and saving
    student_tokens: NonNegativeInt = 0  # predictions of the student in this stage that received a gradient
    finished: bool = False
    evaluation_due: bool = False  # one that could not be made at this step, as the teacher was away
    best: Best | None = None  # of this stage
    streams: dict[str, Position] = field(default_factory=dict)  # by name
    log: dict[str, NonNegativeInt] = field(default_factory=dict)  # byte offsets of metrics.jsonl and samples.jsonl
    stage_seconds: dict[str, float] = field(default_factory=dict)  # of the stages that are done
    stage_configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # of the stages that are done
    by_length: bool = (
        True  # items of a step that are of like lengths share a micro-batch; not so in runs of before that
    )
    started: str | None = None  # when the run was, in ISO 8601: the time that chat templates print
