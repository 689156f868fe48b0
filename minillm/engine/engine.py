"""The protocol of an engine, as the trainer sees it: it turns terms into one optimiser step, and saves what it alone knows.

A method never learns which engine runs it; an engine never learns which method it runs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from minillm.methods.protocol import Term
from minillm.storage.snapshot import SavedPart


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not a number. The engine is not to be used any more: its weights may hold it too."""

    @classmethod
    def of(cls, numbers: Mapping[str, float]) -> "NonFiniteError":
        """The result with the losses and the norm that were found."""
        return cls(", ".join(f"{name} {value}" for name, value in numbers.items()))


@dataclass(frozen=True)
class StepResult:
    """The report of one optimiser step: numbers over the global batch."""

    metrics: dict[str, float]  # loss, loss/<term>, grad_norm, learning_rate, and the means of the terms' metrics
    rows: int  # predictions of the student that received a gradient
    # of a mixture of experts: how often tokens were sent to each expert, a list for each layer
    expert_tokens: list[list[int]] = field(default_factory=list)


class Engine(Protocol):
    """One process or many: the same protocol."""

    rank: int
    world_size: int

    def step(self, micro_batches: Sequence[Sequence[Term]]) -> StepResult:
        """Gradients of all micro-batches, clipped, and one optimiser step.

        Raises NonFiniteError. The step then counts for nothing, and nothing of it may be saved.
        """

    def state_part(self) -> SavedPart:
        """Everything but the weights that is needed to go on: optimiser, schedule, random generators. A file of each rank."""

    def load_state(self, folder: Path) -> None:
        """Read what state_part wrote, on an engine made from the same configuration and weights.

        Raises UserError, naming the file, where it is missing or holds the state of another engine.
        """

    def close(self) -> None:
        """Give back the student's memory and the optimiser's; neither is of use afterwards. All ranks together."""
