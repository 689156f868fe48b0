"""The keys of method dpkd; the formulas are in minillm/methods/dpkd.py."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from minillm.config.method import MethodConfig, Probability
from minillm.config.needs import Needs, TermNeeds
from minillm.config.preference_keys import PreferenceKeys


class DPKD(PreferenceKeys, MethodConfig):
    """Direct preference knowledge distillation (arXiv 2406.19774): the teacher's choice is preferred to the student's."""

    name: Literal["dpkd"]
    pairs: Literal["sequence", "token_argmax", "data"] = Field(
        "sequence",
        description="sequence: sampled answers of teacher and student (the paper); token_argmax: their likeliest ids at "
        "every token of the references (the released code); data: the chosen and rejected answers of data.pairs, with "
        "the teacher as the reference alone",
    )
    ce_coef: Annotated[float, Field(ge=0.0)] = Field(
        1.0, description="token_argmax: weight of the cross-entropy on the references"
    )
    lm_coef: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Weight of the pre-training loss on data.corpus")
    pt_kd_ratio: Probability = Field(
        0.0, description="Weight of the forward KL to the teacher in the pre-training loss (released: 0.5)"
    )
    summary: ClassVar[str] = (
        "direct preference knowledge distillation (DPKD): the teacher's choice before the student's"
    )
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "margin": ("Margin of the teacher's choice over the student's", "reward")
    }

    def needs(self) -> Needs:
        compared, lm_teacher = not self.reference_free, self.lm_coef > 0 and self.pt_kd_ratio > 0
        first = {
            "token_argmax": TermNeeds(
                "preference", ("references",), teacher=True, labels=2 + (self.ce_coef > 0), scored=True
            ),
            "sequence": TermNeeds("preference", ("answers",), teacher=compared, sequences=2),
            "data": TermNeeds("preference", ("pairs",), teacher=compared, kept=compared),
        }[self.pairs]
        pretraining = TermNeeds("pretraining", ("corpus",), teacher=self.pt_kd_ratio > 0)
        samples, reads = self.pairs == "sequence", self.pairs == "data" and compared
        return Needs(
            (first, pretraining) if self.lm_coef > 0 else (first,),
            prompts=self.pairs != "data",
            references=self.pairs == "token_argmax",
            pairs=self.pairs == "data",
            corpus=self.lm_coef > 0,
            samples=("teacher", "student") if samples else (),
            teacher=self.pairs != "data" or compared or lm_teacher,
            teacher_abilities=frozenset({"sample"} if samples else {"hidden"} if reads else ()),
            because={"corpus": "lm_coef", "references": "pairs", "pairs": "pairs"}
            | ({"teacher": "reference_free"} if self.pairs == "data" and not lm_teacher else {}),
        )

    def findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        yield from self.preference_findings()

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        yield from self.idle_preference_keys()
        if self.pairs == "token_argmax":
            yield "length_norm", "has no effect on pairs token_argmax: every token is a pair of its own", "pairs"
        else:
            yield "ce_coef", f"has no effect on pairs {self.pairs}; it is for token_argmax", "pairs"
        if self.lm_coef == 0:
            yield "pt_kd_ratio", "has no effect: with lm_coef 0 there is no pre-training loss", "lm_coef"


KEYS = DPKD
