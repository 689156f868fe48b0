"""The keys of method cmc; the formulas are in minillm/methods/cmc.py."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, TermNeeds


class CMC(MethodConfig):
    """Cross-model control (arXiv 2410.17599): a small delta model whose logits are added to those of a frozen template.

    The template is the teacher. `minillm generate MODEL --delta DELTA` adds the delta's logits to those of another model.
    """

    name: Literal["cmc"]
    forget_coef: Annotated[float, Field(ge=0.0)] = Field(
        0.0,
        description="Weight of the negative cross-entropy on data.forget, beside the cross-entropy on data.prompts, which "
        "then is the set to retain (published: 1); 0: nothing is forgotten",
    )
    summary: ClassVar[str] = "cross-model control: its logits were trained to be added to those of a frozen template"

    @classmethod
    def panels_of(cls, keys: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        panels = {"cross_entropy_nats": ("Cross-entropy of template and delta", "nats/token")}
        if keys.get("forget_coef"):
            panels["forget_cross_entropy_nats"] = ("The same on what is to be forgotten", "nats/token")
        return panels

    def needs(self) -> Needs:
        terms = [TermNeeds("control", ("references",), teacher=True, summed=True)]
        if self.forget_coef > 0:
            terms.append(TermNeeds("forget", ("forget",), teacher=True, summed=True))
        return Needs(
            tuple(terms),
            references=True,
            forget=self.forget_coef > 0,
            teacher=True,
            teacher_abilities=frozenset({"hidden"}),
            controls_teacher=True,
            because={"forget": "forget_coef"},
        )


KEYS = CMC
