"""DistiLLM (arXiv 2402.03898): a skew KL on references and on the student's answers, which a replay buffer uses again."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from minillm import UserError
from minillm.config.root import StageConfig
from minillm.methods.on_policy import sample_answers
from minillm.methods.protocol import Item, Method, Observation, Term, TrainingData
from minillm.methods.supervised import mixed_term, pretraining_term, take_references
from minillm.models.batch import TokenSequence
from minillm.rollout.buffer import Rollout, RolloutBuffer
from minillm.teachers.pair import Models

Source = Literal["references", "fresh", "replayed"]
REPLAY = 1  # tells the draw from the buffer from the coin of the same step


class DistiLLM(Method):
    """L = skew KL, mean over response tokens, + lm_coef * cross-entropy on data.corpus.

        skew_forward_kl   KL(p || skew p + (1 - skew) q)
        skew_reverse_kl   KL(q || (1 - skew) p + skew q), with the gradient of both q

    With phi the threshold and a coin u in [0, 1) for each step n, counted from 1:

        u < phi (1 - n / steps)     new answers of the student, which are put into the buffer
        u < phi                     answers drawn from the buffer; new ones as long as it is not full
        otherwise                   references

    An evaluation whose loss is at least the reference loss + `tolerance` raises phi by `threshold_step`, to 1 at most,
    and becomes the reference loss. The first evaluation only sets that. An improvement does not lower it.

    The skew forward KL is the divergence itself; the released code leaves out the teacher's entropy, which changes the
    value but no gradient. The released code also does not shift the labels of its own answers, so that their first
    token is never trained; here every response token is.
    """

    def __init__(self, config: StageConfig):
        super().__init__(config)
        self.threshold: float = config.method.threshold_start
        self.reference_loss: float | None = None  # None before the first evaluation
        self.replay: list[Rollout] = []  # the oldest first
        self.steps: dict[Source, int] = {"references": 0, "fresh": 0, "replayed": 0}  # taken so far on each
        self.source: Source = "references"  # of the step that is being taken

    @property
    def fresh_threshold(self) -> float:
        """The coins below it are for new answers, whatever the buffer holds."""
        n = sum(self.steps.values()) + 1
        return self.threshold * max(0.0, 1 - n / self.config.method.steps)

    def choose(self, coin: float) -> Source:
        """The source of the next step for a coin in [0, 1)."""
        if coin >= self.threshold:
            return "references"
        full = len(self.replay) >= self.config.method.replay_size
        return "replayed" if full and coin >= self.fresh_threshold else "fresh"

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        references = take_references(data, self.step_size)
        self.source = self.choose(np.random.default_rng([self.config.seed, draw]).random())
        if self.source == "references":
            return references
        if self.source == "replayed":
            generator = np.random.default_rng([self.config.seed, draw, REPLAY])
            twice = len(self.replay) < self.step_size  # a small buffer is drawn from with repetition
            chosen = generator.choice(len(self.replay), size=self.step_size, replace=twice)
            return [self.replay[index].sequence for index in chosen]
        answers = sample_answers(references, data, self.config, draw=draw)
        fresh = [
            Rollout(
                item.key,
                answer.prompt,
                answer.response,
                answer.ended,
                extras=answer.extras,
                teacher_prompt=answer.teacher_prompt,
                judge=item.judge,
            )
            for item, answer in zip(references, answers, strict=True)
        ]
        self.replay = [*self.replay, *fresh][-self.config.method.replay_size :]
        return [rollout.sequence for rollout in fresh]

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        keys = self.config.method
        terms = [mixed_term(items, models, divergence=keys.divergence, ce_ratio=0.0, options={"alpha": keys.skew})]
        if keys.lm_coef > 0:
            terms.append(pretraining_term(len(items), data, models, weight=keys.lm_coef))
        return terms

    def observe(self, observation: Observation) -> dict[str, float]:
        """Count a step, or compare an evaluation's loss with the reference loss.

        Raises UserError where the threshold adapts and no evaluation set has references.
        """
        if observation.kind == "step":
            self.steps[self.source] += 1
            taken = sum(self.steps.values())
            shares = {f"{source}_share": self.steps[source] / taken for source in ("fresh", "replayed")}
            return {"threshold": self.threshold, **shares}
        if self.needs.evaluations:
            self._adapt(observation.metrics.get("loss_nats"))
        return {}

    def _adapt(self, loss: float | None) -> None:
        keys = self.config.method
        if loss is None:
            raise UserError(
                "method.threshold_step: distillm moves its threshold by the loss on references of eval.sets, but none of "
                "these sets has any; give it one that does, or set method.threshold_step to 0"
            )
        if self.reference_loss is None:
            self.reference_loss = loss
        elif loss >= self.reference_loss + keys.tolerance:
            self.threshold = min(1.0, self.threshold + keys.threshold_step)
            self.reference_loss = loss

    def state_dict(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "reference_loss": self.reference_loss,
            "steps": self.steps,
            "replay": RolloutBuffer(self.replay).state() if self.replay else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold, self.reference_loss = state["threshold"], state["reference_loss"]
        self.steps = dict(state["steps"])
        self.replay = RolloutBuffer.from_state(state["replay"]).rollouts if state["replay"] else []


METHOD = DistiLLM
