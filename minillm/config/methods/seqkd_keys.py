"""The keys of method seqkd; the formulas are in minillm/methods/seqkd.py."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from minillm.config.method import MethodConfig, Probability
from minillm.config.needs import Needs, TermNeeds


class SeqKD(MethodConfig):
    """Sequence-level distillation: the teacher answers every prompt once, and the student is trained on these answers."""

    name: Literal["seqkd"]
    temperature: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Of the teacher's answers; 0 is greedy")
    kd_ratio: Probability = Field(
        0.0, description="Weight of the forward KL to the teacher (the released scripts: 0.5)"
    )
    summary: ClassVar[str] = "sequence-level distillation: training on the teacher's answers"

    def needs(self) -> Needs:
        return Needs(
            (TermNeeds("distillation", ("answers",), teacher=self.kd_ratio > 0),),
            samples=("teacher",),
            several_answers=self.temperature > 0,
            written_once=True,
            temperature_key="method.temperature",
            teacher=True,
            teacher_abilities=frozenset({"answer"}),
        )


KEYS = SeqKD
