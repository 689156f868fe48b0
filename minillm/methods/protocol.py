"""What a method is: what to train on, and the terms of its loss. docs/methods.md says every planned method in it.

A method never runs a backward pass, never asks which engine runs it, and keeps no state of its own: what must
survive a kill is the position of its streams and the rollout buffer that `collect` returned.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from minillm.config.root import StageConfig
from minillm.data.stream import RankSlice, Stream
from minillm.distributed import collectives
from minillm.models.batch import Pair, TokenBatch
from minillm.models.pair import Models
from minillm.rollout.buffer import Rollout, RolloutBuffer
from minillm.storage.timing import Timing

Objective = Callable[..., Tensor | tuple[Tensor, dict[str, Tensor]]]
ProgressCallback = Callable[[str, int, int], None]  # (what is being done, how many are, of how many)


@dataclass(frozen=True)
class Term:
    """One summand of the loss: weight * sum over rows of objective(stats, **inputs) / divisor.

    The divisor is the sum of `count` over all micro-batches and ranks of the step: the engine adds them up, so that
    one big batch and its micro-batches give the same gradient.
    """

    name: str
    batch: TokenBatch  # N rows
    objective: Objective  # per-row loss (N,), or (loss, {metric: (N,)}), from minillm.losses.TokenStats
    fields: tuple[str, ...]  # the statistics that the objective reads
    count: float
    weight: float = 1.0
    inputs: dict[str, Tensor] = field(default_factory=dict)  # (N,) each
    teacher_hidden: Tensor | None = None  # (N, H_t), where a field needs the teacher
    options: dict[str, Any] = field(default_factory=dict)  # beta, alpha, temperature of linear_objective


@dataclass(frozen=True)
class TrainingData:
    """Where a method gets its material. The streams carry their own position."""

    prompts: Stream  # of minillm.data.instructions.Example
    corpus: Stream | RankSlice | None  # of token blocks: list[int]
    written: Path  # a folder for answers that are written once and kept
    report_progress: ProgressCallback = lambda what, done, total: None  # told how far long work inside `collect` is
    timing: Timing = field(default_factory=Timing)  # told what that work was


@dataclass(frozen=True)
class Supervised:
    """A prompt with the response to imitate."""

    key: int
    prompt: list[int]
    response: list[int]

    @property
    def pair(self) -> Pair:
        return self.prompt, self.response


Item = Supervised | Rollout


class Method(ABC):
    """See the module. `step_size` is the number of items of one optimiser step over all micro-batches and ranks."""

    inner_epochs: int = 1  # passes over what one `collect` returned
    needs_references: bool = True  # prompts without an answer to imitate are an error before the first step

    def __init__(self, config: StageConfig):
        self.config = config
        self.step_size = (
            config.train.per_device_train_batch_size
            * config.train.gradient_accumulation_steps
            * collectives.world_size()
        )

    @abstractmethod
    def collect(self, data: TrainingData, models: Models, draw: int) -> Sequence[Item] | RolloutBuffer:
        """The items of the next steps; `draw` counts the collections of this run and keys their randomness.

        What lasts for more than one step must be a RolloutBuffer: checkpoints carry it.
        """

    @abstractmethod
    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        """The loss of one micro-batch of items."""
