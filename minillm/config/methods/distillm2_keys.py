"""The keys of method distillm2; the formulas are in minillm/methods/distillm2.py."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, TermNeeds


class DistiLLM2(MethodConfig):
    """Contrastive distillation (arXiv 2503.07067): a skew KL on the teacher's answers, a skew reverse KL on the student's."""

    name: Literal["distillm2"]
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="alpha of both: KL(p || alpha p + (1 - alpha) q) and KL(q || (1 - alpha) p + alpha q)"
    )
    student_weight: Annotated[float, Field(gt=0.0)] = Field(
        1.0, description="Weight of the loss on the student's answers beside that on the teacher's (released: 1)"
    )
    summary: ClassVar[str] = "contrastive distillation on the teacher's answers and the student's (DistiLLM-2)"
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "skew_forward_kl_nats": ("Skew KL on the teacher's answers", "nats/token"),
        "skew_reverse_kl_nats": ("Skew reverse KL on the student's answers", "nats/token"),
    }

    def needs(self) -> Needs:
        return Needs(
            tuple(TermNeeds(name, ("answers",), teacher=True) for name in ("teacher_answers", "student_answers")),
            samples=("teacher", "student"),
            teacher=True,
            teacher_abilities=frozenset({"sample"}),
        )


KEYS = DistiLLM2
