"""The keys of method sft; the formulas are in minillm/methods/sft.py."""

from typing import ClassVar, Literal

from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, TermNeeds


class SFT(MethodConfig):
    """Supervised fine-tuning on the references."""

    name: Literal["sft"]
    summary: ClassVar[str] = "supervised fine-tuning on reference answers"

    def needs(self) -> Needs:
        return Needs((TermNeeds("supervised", ("references",)),), references=True)


KEYS = SFT
