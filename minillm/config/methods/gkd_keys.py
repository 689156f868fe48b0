"""The keys of method gkd; the formulas are in minillm/methods/gkd.py."""

from typing import ClassVar, Literal

from pydantic import Field

from minillm.config.method import MethodConfig, Probability
from minillm.config.needs import Needs, TermNeeds


class GKD(MethodConfig):
    """Generalised knowledge distillation (arXiv 2306.13649): JSD on the student's samples or on references."""

    name: Literal["gkd"]
    on_policy: Probability = Field(0.5, description="lambda: the fraction of steps on the student's own answers")
    beta: Probability = Field(0.5, description="Generalised JSD; 0 is the forward KL and 1 the reverse KL")
    summary: ClassVar[str] = "generalised knowledge distillation"

    def needs(self) -> Needs:
        rows = ("answers",) * (self.on_policy > 0) + ("references",) * (self.on_policy < 1)
        return Needs(
            (TermNeeds("distillation", rows, teacher=True, shared=True),),
            references=self.on_policy < 1,
            samples=("student",) if self.on_policy > 0 else (),
            several_answers=self.on_policy == 1,
            teacher=True,
            because={"references": "on_policy"},
        )


KEYS = GKD
