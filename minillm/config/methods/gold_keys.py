"""The keys of method gold; the formulas are in minillm/methods/gold.py."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from minillm.config.method import MethodConfig, Probability
from minillm.config.needs import Needs, TermNeeds


class GOLD(MethodConfig):
    """General online logit distillation (Hugging Face, 2025): groups of tokens, from a teacher with any tokenizer."""

    name: Literal["gold"]
    on_policy: Probability = Field(0.5, description="The fraction of steps on the student's own answers")
    beta: Probability = Field(
        0.5, description="Generalised JSD of what matches; 0 is the forward KL and 1 the reverse KL"
    )
    matched_weight: Probability | None = Field(
        None,
        description="w: the weight of what matches; the distance of the sorted probabilities of the rest has 1 - w. "
        "null: the fraction of the smaller vocabulary that matches",
    )
    ce_coef: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Weight of the cross-entropy on the references beside it"
    )
    summary: ClassVar[str] = "groups of tokens of a teacher with a tokenizer of its own (GOLD)"
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "grouped_tokens": ("Tokens in groups", "0 to 1"),
        "matched_divergence_nats": ("Divergence of what matches", "nats"),
        "unmatched_distance": ("Distance of the sorted rest", "0 to 2"),
    }

    def needs(self) -> Needs:
        rows = ("answers",) * (self.on_policy > 0) + ("references",) * (self.on_policy < 1)
        return Needs(
            (TermNeeds("distillation", rows, teacher=True, sorts=True),),
            references=self.on_policy < 1,
            samples=("student",) if self.on_policy > 0 else (),
            teacher=True,
            teacher_abilities=frozenset({"read", "logprobs"}),
            other_tokenizer=True,
            because={"references": "on_policy"},
        )

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        if self.matched_weight == 0:
            yield "beta", "has no effect: with matched_weight 0 nothing is compared by it", "matched_weight"
        if self.on_policy == 1 and self.ce_coef > 0:
            yield "ce_coef", "has no effect: with on_policy 1 no step has references", "on_policy"


KEYS = GOLD
