"""The keys of method step_by_step; the formulas are in minillm/methods/step_by_step.py."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from minillm.config.data import TaskKeys
from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, TermNeeds


class Task(TaskKeys):
    """One of the tasks of a student that learns several from every record."""

    weight: Annotated[float, Field(gt=0.0)] = Field(
        1.0, description="Of the mean over the tokens of the task's answers"
    )


class StepByStep(MethodConfig):
    """Distilling step by step (arXiv 2305.02301): labels and the rationales behind them, each a task of its own."""

    name: Literal["step_by_step"]
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], Task] = Field(
        {
            "label": Task(prefix="predict: ", answer="{label}"),
            "rationale": Task(prefix="explain: ", answer="{rationale}"),
        },
        min_length=1,
        description="The tasks by name, of letters, digits and _; those that are given take the place of both",
    )
    summary: ClassVar[str] = "distilling step by step: labels and rationales as separate tasks"

    @classmethod
    def panels_of(cls, keys: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        names = list(keys.get("tasks") or cls.model_fields["tasks"].default)
        losses = {f"cross_entropy_nats/{name}": (f"Cross-entropy of task {name}", "nats/token") for name in names}
        return losses | {f"unanswered_percent/{name}": (f"Records without a {name}", "%") for name in names}

    def needs(self) -> Needs:
        return Needs(tuple(TermNeeds(name, ("references",)) for name in self.tasks), tasks=dict(self.tasks))


KEYS = StepByStep
