"""DistiLLM (arXiv 2402.03898): a skew KL on references and on the student's answers, which a replay buffer uses again."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from minillm import UserError
from minillm.config.root import StageConfig
from minillm.methods.protocol import Item, Method, Observation, Term, TrainingData
from minillm.methods.supervised import mixed_term, take_references
from minillm.models.batch import TokenSequence
from minillm.rollout.buffer import Rollout, RolloutBuffer
from minillm.rollout.noise import distinct_keys
from minillm.rollout.rollouts import Sampling
from minillm.teachers.pair import Models

REPLAY = 1  # tells the draw from the buffer from the coin of the same step


class DistiLLM(Method):
    """L = skew KL, mean over response tokens, + lm_coef * cross-entropy on data.corpus.

    With phi the threshold and a coin u in [0, 1) for each step, counted from 0 as n:

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
        self.reference_loss: float | None = None
        self.taken = 0
        self.replay: list[Rollout] = []  # the oldest first
        self.source = {"fresh": 0.0, "replayed": 0.0}  # of the step that is being taken

    def collect(self, data: TrainingData, models: Models, draw: int) -> list[TokenSequence]:
        references = take_references(data, self.step_size)
        coin = np.random.default_rng([self.config.seed, draw]).random()
        choice = self.choose(coin)
        self.source = {"fresh": float(choice == "fresh"), "replayed": float(choice == "replay")}
        if choice == "references":
            return references
        if choice == "replay":
            generator = np.random.default_rng([self.config.seed, draw, REPLAY])
            few = len(self.replay) < len(references)
            chosen = generator.choice(len(self.replay), size=len(references), replace=few)
            return [self.replay[index].sequence for index in chosen]
        answers = self._sample(references, data, draw)
        self.replay = [*self.replay, *answers][-self.config.method.replay_size :]
        return [answer.sequence for answer in answers]

    def choose(self, coin: float) -> str:
        """The source of the next step, "fresh", "replay" or "references", for a coin in [0, 1)."""
        keys = self.config.method
        full = len(self.replay) >= keys.replay_size
        if coin < self.threshold * max(0.0, 1 - self.taken / keys.steps):
            return "fresh"
        if coin < self.threshold:
            return "replay" if full else "fresh"
        return "references"

    def _sample(self, references: Sequence[TokenSequence], data: TrainingData, draw: int) -> list[Rollout]:
        rollout = self.config.rollout
        with data.timing.of("rollout"):
            answers = data.rollouts.sample(
                [item.prompt for item in references],
                Sampling(rollout.max_new_tokens, rollout.temperature, rollout.top_k, rollout.top_p),
                keys=distinct_keys([item.key for item in references]),
                extras=[item.extras for item in references],
                seed=self.config.seed,
                draw=draw,
                batch_size=rollout.batch_size,
                progress=lambda done: data.report_progress("sampling answers", done, len(references)),
            )
        return [
            Rollout(item.key, answer.prompt, answer.response, answer.ended, extras=answer.extras)
            for item, answer in zip(references, answers, strict=True)
        ]

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        keys = self.config.method
        term = mixed_term(items, models, divergence=keys.divergence, ce_ratio=0.0, options={"alpha": keys.skew})
        if keys.lm_coef == 0:
            return [term]
        blocks = [TokenSequence(block[:1], block[1:]) for block in data.corpus.take(len(items))]
        pretraining = mixed_term(
            blocks, models, divergence="forward_kl", ce_ratio=1.0, name="pretraining", weight=keys.lm_coef
        )
        return [term, pretraining]

    def observe(self, observation: Observation) -> dict[str, float]:
        """Count a step, or compare an evaluation's loss with the reference loss."""
        if observation.kind == "step":
            self.taken += 1
            return {"threshold": self.threshold, **self.source}
        keys, loss = self.config.method, observation.metrics.get("loss_nats")
        if keys.threshold_step == 0 or self.threshold >= 1:
            return {}  # nothing can move
        if loss is None:
            raise UserError(
                "method distillm adapts its threshold to the evaluation's loss, but no set of eval.sets has references; "
                "give one, or set method.threshold_step=0"
            )
        if self.reference_loss is None:
            self.reference_loss = loss
        elif loss >= self.reference_loss + keys.tolerance:
            self.threshold = min(1.0, self.threshold + keys.threshold_step)
            self.reference_loss = loss
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "threshold": self.threshold,
            "reference_losses": [] if self.reference_loss is None else [self.reference_loss],
            "taken": self.taken,
            "replay": RolloutBuffer(self.replay).state() if self.replay else {},
            "source": self.source,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.threshold, self.taken, self.source = state["threshold"], state["taken"], dict(state["source"])
        self.reference_loss = state["reference_losses"][0] if state["reference_losses"] else None
        self.replay = RolloutBuffer.from_state(state["replay"]).rollouts if state["replay"] else []


METHOD = DistiLLM
