"""The keys of method lm; the formulas are in minillm/methods/lm.py."""

from typing import ClassVar, Literal

from pydantic import Field

from minillm.config.method import MethodConfig, Probability
from minillm.config.needs import Needs, TermNeeds


class LM(MethodConfig):
    """Pre-training on the packed blocks of a corpus: (1 - kd_ratio) cross-entropy + kd_ratio forward KL to the teacher."""

    name: Literal["lm"]
    kd_ratio: Probability = Field(
        0.0, description="Weight of the forward KL to the teacher (word-level distillation as in MiniPLM's tables: 0.5)"
    )
    summary: ClassVar[str] = "pre-training on plain text"
    panels: ClassVar[dict[str, tuple[str, str]]] = {"cross_entropy_nats": ("Cross-entropy on the text", "nats/token")}

    def needs(self) -> Needs:
        return Needs(
            (TermNeeds("pretraining", ("corpus",), teacher=self.kd_ratio > 0, shared=True),),
            prompts=False,
            corpus=True,
            teacher=self.kd_ratio > 0,
            because={"teacher": "kd_ratio"},
        )


KEYS = LM
