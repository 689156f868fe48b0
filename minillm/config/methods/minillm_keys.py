"""The keys of method minillm; the formulas are in minillm/methods/minillm.py."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from minillm.config.method import MethodConfig, Probability
from minillm.config.needs import Needs, TermNeeds

# Differences between a preset and the defaults below. The defaults are the published formulas with the settings that were
# ahead of the published ones on both measured pairs of models (benchmarks/results/evidence.md).
PAPER = dict(ppo_epochs=4)
LMOPS = dict(
    ppo_epochs=4,
    gamma=0.95,
    return_from="current",
    whiten="all",
    importance_weight_in_clip=True,
    single_step_weighted=False,
    reduction="tokens",
    reward_scaling=0.5,
    cliprange_reward=100.0,
    pt_kd_ratio=0.5,
)
PRESETS = {"measured": {}, "paper": PAPER, "lmops": LMOPS}


class MiniLLM(MethodConfig):
    """MiniLLM (arXiv 2306.08543): policy gradient of the sequence-level reverse KL on the student's own samples."""

    name: Literal["minillm"]
    preset: Literal["measured", "paper", "lmops"] = Field(
        "measured",
        description="measured: the published formulas with settings that measured better; paper: with the published "
        "settings; lmops: the computation of the released code. Keys that are given override it",
    )
    alpha: Probability = Field(
        0.2, description="Mixture weight of the teacher in the sampling distribution alpha p + (1 - alpha) q"
    )
    gamma: Annotated[float, Field(ge=0.0, le=1.0)] = Field(1.0, description="Discount of later rewards")
    return_from: Literal["next", "current"] = Field(
        "next", description="The first reward in a token's return: that of the next token, or its own (current)"
    )
    length_norm: bool = Field(True, description="Divide a return by the number of its rewards")
    whiten: Literal["none", "valid", "all"] = Field(
        "none", description="Standardise advantages over response tokens (valid) or over padding as well (all)"
    )
    cliprange: Annotated[float, Field(gt=0.0)] | None = Field(
        0.2, description="PPO's clip range of the ratio; null: no clip"
    )
    importance_weight_in_clip: bool = Field(
        True, description="Clip q/p~ (true) or the ratio to the sampling student alone, weighted outside (false)"
    )
    importance_weight: Literal["token", "per_decision", "sequence"] = Field(
        "token",
        description="token: the paper's q/p~ of each token alone; per_decision and sequence: the products that make "
        "the gradient exact, at a higher variance",
    )
    single_step_weighted: bool = Field(True, description="Weight the single-step term by q/p~")
    single_step: bool = Field(True, description="The exact one-token reverse KL; false is the paper's ablation")
    reduction: Literal["sequences", "tokens"] = Field(
        "sequences", description="Sum over tokens divided by the number of sequences, or by the number of tokens"
    )
    ppo_epochs: Annotated[int, Field(ge=1)] = Field(
        2,
        description="Passes over each buffer of answers (published: 4); fewer learn more per token, and sample more",
    )
    reward_scaling: Annotated[float, Field(gt=0.0)] | None = Field(None, description="Rewards are divided by this")
    cliprange_reward: Annotated[float, Field(gt=0.0)] | None = Field(
        None, description="Rewards are then clipped to +- this"
    )
    lm_coef: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Weight of the pre-training loss on data.corpus")
    pt_kd_ratio: Probability = Field(
        0.0, description="Weight of the forward KL to the teacher in the pre-training loss"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        preset = values.get("preset") if isinstance(values, dict) else None
        return {**PRESETS[preset], **values} if preset in PRESETS else values

    summary: ClassVar[str] = "MiniLLM: policy gradient of the sequence-level reverse KL on the student's own samples"

    def needs(self) -> Needs:
        terms = [TermNeeds("policy", ("answers",), teacher=True, shared=True)]
        if self.lm_coef > 0:
            terms.append(TermNeeds("pretraining", ("corpus",), teacher=self.pt_kd_ratio > 0, shared=True))
        sampler = {0.0: "student", 1.0: "teacher"}.get(self.alpha, "mixture")
        return Needs(
            tuple(terms),
            corpus=self.lm_coef > 0,
            samples=(sampler,),
            several_answers=True,
            teacher_share=self.alpha,
            buffered=True,
            as_drawn=sampler == "student",
            inner_epochs=self.ppo_epochs,
            neutral_sampling=True,
            teacher=True,
            teacher_abilities=frozenset({"student": (), "teacher": {"sample"}, "mixture": {"mix"}}[sampler]),
            because={"corpus": "lm_coef"},
        )

    def unset_value(self, key: str) -> Any:
        return PRESETS[self.preset].get(key, super().unset_value(key))

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        if self.lm_coef == 0:
            yield "pt_kd_ratio", "has no effect: with lm_coef 0 there is no pre-training loss", "lm_coef"
        if not self.single_step:
            yield "single_step_weighted", "has no effect: with single_step false there is no such term", "single_step"
        if self.cliprange is None:
            yield "importance_weight_in_clip", "has no effect: with cliprange null nothing is clipped", "cliprange"
        if self.alpha == 0:
            own = "has no effect: with alpha 0 the student samples alone, and every importance weight is 1"
            for key in ("importance_weight", "importance_weight_in_clip", "single_step_weighted"):
                yield key, own, "alpha"


KEYS = MiniLLM
