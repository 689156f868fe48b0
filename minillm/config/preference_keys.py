"""The keys of a preference between two answers, which several methods share; minillm/methods/preference.py has the loss."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from minillm.config.keys import Strict


class PreferenceKeys(Strict):
    """The loss of a pair. DPO is length_norm false; SimPO is reference_free with a target_margin; DPOP has a dpop above 0."""

    beta: Annotated[float, Field(gt=0.0)] = Field(
        0.1,
        description="Factor of the log-ratios, which makes rewards of them (ipo: the margin aimed at is 1 / (2 beta))",
    )
    length_norm: bool = Field(True, description="Divide the log-ratio of an answer by its number of tokens")
    preference_loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid", description="sigmoid: -log sigmoid of the margin; ipo: its squared distance from a fixed one"
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.0, description="sigmoid: the probability that a pair is in the wrong order"
    )
    dpop: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="Penalty on a chosen answer that is less likely than under the teacher (DPOP's lambda: 50)"
    )
    reference_free: bool = Field(False, description="Compare the student's log-probabilities, without the teacher's")
    target_margin: Annotated[float, Field(ge=0.0)] = Field(
        0.0, description="sigmoid: the margin that a pair should have at least (SimPO's gamma)"
    )

    def preference_findings(self) -> Iterator[tuple[str, str, tuple[str, ...]]]:
        """Contradictions between these keys, as MethodConfig.findings has them."""
        if self.dpop > 0 and self.reference_free:
            message = "compares with the teacher, which reference_free leaves out; set one of them to its default"
            yield "dpop", message, ("reference_free",)

    def idle_preference_keys(self) -> Iterator[tuple[str, str, str]]:
        """Those of these keys that another leaves without effect, as MethodConfig.idle_keys has them."""
        if self.preference_loss == "ipo":
            for key in ("label_smoothing", "target_margin"):
                yield key, "has no effect on preference_loss ipo; it is for sigmoid", "preference_loss"
