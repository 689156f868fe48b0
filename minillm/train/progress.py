"""Where a run stands: what a checkpoint says beside weights, optimiser and buffer."""

from dataclasses import dataclass, field


@dataclass
class Progress:
    """Where a run stands. Together with the weights, engine.pt and the buffer this is all that resuming needs."""

    stage: str
    step: int = 0  # over all stages
    stage_step: int = 0
    draw: int = 0  # collections so far
    epoch: int = 0  # of the current collection
    position: int = 0  # items of this epoch already used
    seconds: float = 0.0  # training time of this stage, without evaluation and saving
    student_tokens: int = 0  # predictions of this stage that received a gradient
    finished: bool = False
    best: dict | None = None  # of this stage: {"metric", "value", "step", "stage"}
    streams: dict = field(default_factory=dict)
    log: dict = field(default_factory=dict)  # byte offsets of metrics.jsonl and samples.jsonl
    stage_seconds: dict[str, float] = field(default_factory=dict)  # of the stages that are done
    stage_configs: dict[str, dict] = field(default_factory=dict)  # of the stages that are done
