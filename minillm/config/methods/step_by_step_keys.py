"""The keys of method step_by_step; the formulas are in minillm/methods/step_by_step.py."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from minillm.config.data import TaskKeys, field_names
from minillm.config.few_shot import FewShot, Part
from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, TermNeeds

Source = Literal["data", "teacher"]


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
    rationales: Source = Field(
        "data", description="{rationale} of the tasks. data: of the records; teacher: written by it, as few_shot asks"
    )
    labels: Source = Field(
        "data", description="{label} of the tasks. data: of the records; teacher: what its answers to few_shot end in"
    )
    few_shot: FewShot | None = Field(None, description="The prompt by which the teacher is asked, where it writes")
    summary: ClassVar[str] = "distilling step by step: labels and rationales as separate tasks"

    @classmethod
    def panels_of(cls, keys: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        names = list(keys.get("tasks") or cls.model_fields["tasks"].default)
        losses = {f"cross_entropy_nats/{name}": (f"Cross-entropy of task {name}", "nats/token") for name in names}
        return losses | {f"unanswered_percent/{name}": (f"Records without a {name}", "%") for name in names}

    @property
    def written(self) -> tuple[Part, ...]:
        """The parts that the teacher writes."""
        sources: dict[Part, Source] = {"rationale": self.rationales, "label": self.labels}
        return tuple(part for part, source in sources.items() if source == "teacher")

    def needs(self) -> Needs:
        writes = bool(self.written)
        return Needs(
            tuple(TermNeeds(name, ("references",)) for name in self.tasks),
            tasks=dict(self.tasks),
            few_shot=self.few_shot if writes else None,
            written=self.written,
            samples=("teacher",) if writes else (),
            written_once=writes,
            temperature_key="method.few_shot.temperature" if writes else "rollout.temperature",
            teacher=writes,
            teacher_abilities=frozenset({"sample"} if writes else ()),
            because={"teacher": self._writing_key} if writes else {},
        )

    def findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        if self.written and self.few_shot is None:
            what = f"{self._writing_key} is teacher"
            yield (
                "few_shot",
                f"missing: while method.{what}, it is the prompt that the teacher answers",
                (self._writing_key,),
            )
        used = {field for task in self.tasks.values() for field in field_names(task.answer)}
        for part in self.written:
            if part not in used:
                yield f"{part}s", f"is teacher, and no task has {{{part}}} in its answer; put it into one", ("tasks",)

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        if not self.written:
            yield "few_shot", "has no effect: nothing is written by the teacher", "rationales"

    @property
    def _writing_key(self) -> str:
        return "rationales" if self.rationales == "teacher" else "labels"


KEYS = StepByStep
