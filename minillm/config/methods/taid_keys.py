"""The keys of method taid; the formulas are in minillm/methods/taid.py."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from minillm.config.method import MethodConfig, Probability
from minillm.config.needs import Needs, TermNeeds


class TAID(MethodConfig):
    """Temporally adaptive interpolated distillation (arXiv 2501.16937): the target moves from the student to the teacher."""

    name: Literal["taid"]
    steps: Annotated[int, Field(ge=1)] = Field(
        description="Steps over which the least t rises from t_start to t_end in a line (published: all of the stage)"
    )
    t_start: Probability = Field(0.4, description="The teacher's part t of the target at first (published: 0.4 or 0.2)")
    t_end: Probability = Field(1.0, description="The greatest t; 1 is the teacher alone")
    adaptive: bool = Field(
        True, description="t may run ahead of the line where the loss falls; false: t is on the line"
    )
    alpha: Probability = Field(5e-4, description="The part of the way to 1 that t goes in a step, at most")
    beta: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.99, description="Momentum of the relative change of the loss, which sets the pace of t"
    )
    summary: ClassVar[str] = "temporally adaptive interpolated distillation (TAID) on reference answers"
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "interpolation": ("Teacher's part t of the target", "0 student, 1 teacher")
    }

    def needs(self) -> Needs:
        term = TermNeeds("distillation", ("references",), teacher=True, shared=True)
        return Needs((term,), references=True, teacher=True)

    def findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        if self.t_start > self.t_end:
            message = f"{self.t_start:g} is above t_end {self.t_end:g}: t rises; lower t_start or raise t_end"
            yield "t_start", message, ("t_end",)

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        if not self.adaptive:
            for key in ("alpha", "beta"):
                yield key, "has no effect: with adaptive false t rises in a line", "adaptive"
        if self.t_start == self.t_end:
            for key in ("adaptive", "alpha", "beta"):
                yield key, "has no effect: with t_start equal to t_end t never moves", "t_start"


KEYS = TAID
