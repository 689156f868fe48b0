"""The keys of method distillm; the formulas are in minillm/methods/distillm.py."""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from minillm.config.method import MethodConfig, Probability
from minillm.config.needs import Needs, TermNeeds


class DistiLLM(MethodConfig):
    """DistiLLM (arXiv 2402.03898): a skew KL, with a replay buffer of the student's answers and an adaptive threshold."""

    name: Literal["distillm"]
    steps: Annotated[int, Field(ge=1)] = Field(
        description="Steps over which new answers give way to the replay buffer (published: all of the stage)"
    )
    divergence: Literal["skew_forward_kl", "skew_reverse_kl"] = Field(
        "skew_forward_kl", description="Of student and teacher at every response token"
    )
    skew: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(0.1, description="Mixture weight of the other model")
    replay_size: Annotated[int, Field(ge=1)] = Field(1000, description="Answers that the replay buffer holds")
    threshold_start: Probability = Field(0.0, description="The fraction of steps on the student's answers at first")
    threshold_step: Probability = Field(
        0.1, description="That fraction rises by this where an evaluation's loss_nats has risen; 0: it stays as it is"
    )
    tolerance: Annotated[float, Field(ge=0.0)] = Field(0.1, description="The least rise of the loss that counts, nats")
    lm_coef: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Weight of the pre-training loss on data.corpus")
    summary: ClassVar[str] = "DistiLLM: a skew KL on references and on the student's own answers, with replay"
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "threshold": ("Threshold of sampled answers", "0 to 1"),
        "fresh_share": ("New answers, part of the steps", "%"),
        "replayed_share": ("Replayed answers, part of the steps", "%"),
    }

    def needs(self) -> Needs:
        answers, references = self._adapts or self.threshold_start > 0, self._adapts or self.threshold_start < 1
        rows = ("answers",) * answers + ("references",) * references
        terms = [TermNeeds("distillation", rows, teacher=True, shared=True)]
        if self.lm_coef > 0:
            terms.append(TermNeeds("pretraining", ("corpus",)))
        return Needs(
            tuple(terms),
            references=references,
            corpus=self.lm_coef > 0,
            samples=("student",) if answers else (),
            teacher=True,
            evaluations=self._adapts,
            because={"corpus": "lm_coef", "evaluations": "threshold_step"},
        )

    @property
    def _adapts(self) -> bool:
        return self.threshold_step > 0 and self.threshold_start < 1

    def idle_keys(self) -> Iterator[tuple[str, str, str]]:
        if self.threshold_start == 1:
            yield "threshold_step", "has no effect: with threshold_start 1 it cannot rise", "threshold_start"
            yield "tolerance", "has no effect: with threshold_start 1 the threshold cannot rise", "threshold_start"
        elif self.threshold_step == 0:
            yield "tolerance", "has no effect: with threshold_step 0 the threshold never moves", "threshold_step"
            if self.threshold_start == 0:
                yield "replay_size", "has no effect: with threshold_step 0 no answer is ever sampled", "threshold_step"


KEYS = DistiLLM
