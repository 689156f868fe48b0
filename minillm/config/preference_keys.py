"""The keys of a preference between two answers, which several methods share; minillm/methods/preference.py has the loss."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from minillm.config.keys import Strict


class PreferenceKeys(Strict):
    """The loss of a pair. DPO is length_norm false; SimPO is reference_free with a target_margin; DPOP has a dpop above 0;
    kto_pair compares each answer with what the other one says of the distance to the reference."""

    beta: Annotated[float, Field(gt=0.0)] = Field(
        0.1,
        description="Factor of the log-ratios, which makes rewards of them (ipo: the margin aimed at is 1 / (2 beta))",
    )
    length_norm: bool = Field(True, description="Divide the log-ratio of an answer by its number of tokens")
    preference_loss: Literal["sigmoid", "ipo", "kto_pair"] = Field(
        "sigmoid",
        description="sigmoid: -log sigmoid of the margin; ipo: its squared distance from a fixed one; kto_pair: the mean of two "
        "sigmoids, each answer against the other's log-ratio, 0 at least",
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

        if self.preference_loss == "kto_pair" and self.reference_free:
            message = (
                "compares with the teacher, which reference_free leaves out; choose another loss, or set that to false"
            )
            yield "preference_loss", message, ("reference_free",)

    def idle_preference_keys(self) -> Iterator[tuple[str, str, str]]:
        """Those of these keys that another leaves without effect, as MethodConfig.idle_keys has them."""
        loss = self.preference_loss
        idle = {"ipo": ("label_smoothing", "target_margin"), "kto_pair": ("label_smoothing", "target_margin", "dpop")}
        for key in idle.get(loss, ()):
            use = "sigmoid and ipo" if key == "dpop" else "sigmoid"
            yield key, f"has no effect on preference_loss {loss}; it is for {use}", "preference_loss"
