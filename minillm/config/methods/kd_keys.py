"""The keys of method kd; the formulas are in minillm/methods/kd.py."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from minillm.config.method import Divergence, MethodConfig, Probability
from minillm.config.needs import Needs, TermNeeds


class KD(MethodConfig):
    """Word-level distillation on the references: (1 - ce_ratio) divergence + ce_ratio cross-entropy, or divergence + ce_coef
    cross-entropy."""

    name: Literal["kd"]
    divergence: Divergence = Field("forward_kl", description="Of student and teacher at every token of the reference")
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.5, description="jsd: mixture weight of the teacher")
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.1, description="skew KLs: mixture weight of the other model"
    )
    ce_ratio: Probability = Field(
        0.5, description="Weight of the cross-entropy on the reference; the divergence has what it leaves of 1"
    )
    ce_coef: Annotated[float, Field(ge=0.0)] | None = Field(
        None,
        description="In the place of ce_ratio: weight of the cross-entropy beside the whole divergence (LLaVA-MoD: 0, then 1)",
    )
    summary: ClassVar[str] = "word-level distillation on reference answers"

    @property
    def weight(self) -> float:
        """The weight of the whole loss, in which the cross-entropy has the share `ce_share`."""
        return 1.0 if self.ce_coef is None else 1.0 + self.ce_coef

    @property
    def ce_share(self) -> float:
        """The part of the cross-entropy in the loss; the divergence has the rest."""
        return self.ce_ratio if self.ce_coef is None else self.ce_coef / self.weight

    def needs(self) -> Needs:
        term = TermNeeds("distillation", ("references",), teacher=self.ce_share < 1, shared=True)
        return Needs((term,), references=True, teacher=True)

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        for key, having in (("beta", ("jsd",)), ("skew", ("skew_forward_kl", "skew_reverse_kl"))):
            if self.divergence not in having:
                message = f"has no effect on divergence {self.divergence}; it is for {' and '.join(having)}"
                yield key, message, "divergence"
        if self.ce_coef is not None:
            yield "ce_ratio", "has no effect beside ce_coef; leave one of the two out", "ce_coef"
        elif self.ce_ratio == 1:
            for key in ("divergence", "beta", "skew"):
                yield key, "has no effect: with ce_ratio 1 the loss is the cross-entropy alone", "ce_ratio"


KEYS = KD
