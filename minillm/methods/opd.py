"""On-policy distillation (Thinking Machines, "On-Policy Distillation", 2025): the sampled reverse KL as a reward.

    L = - mean over the tokens of the answers of rho_t A_t,    rho_t = q(y_t) / q_old(y_t),    y ~ s
    A_t = w_t (log p(y_t) - log q_old(y_t) + task_reward_weight * r(prompt, answer)),    w_t = q_old(y_t) / s(y_t)

q_old is the student that sampled, and s its distribution at rollout.temperature. Every token has its own log-ratio alone (a
discount of 0) and no baseline; the task reward r, where there is one, is that of its answer. With cliprange the loss of a
token is PPO's, the larger of -rho_t A_t and -clip(rho_t) A_t. In expectation the gradient at q_old is that of KL(q || p) at
every sampled prefix, of which this is the estimate that needs no more of the teacher than one log-probability a token.

At temperature 1, as published, s is q_old and w_t is 1. At another one the weight makes of a token of s what it is under
q, so that still KL(q || p) is minimised and not that of a model at the temperature, at prefixes which s draws; the task
reward is that of answers which go on as s does. Below 1 the weights of rare tokens have no bound. Tokens that top_k or
top_p ban would be missing from the sum over the vocabulary, which no weight makes good: both are refused.
"""

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from minillm import UserError
from minillm.data.instructions import Example
from minillm.distributed import collectives
from minillm.losses import TokenStats
from minillm.methods.on_policy import clipped_policy_loss, sample_answers
from minillm.methods.protocol import Method, Observation, Term, TrainingData
from minillm.models.batch import collate
from minillm.rollout.buffer import Rollout, RolloutBuffer
from minillm.rollout.scoring import score
from minillm.teachers.pair import Models


def policy_objective(cliprange: float | None) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """The loss of a token (the module's formula), with the ratio, and the share of tokens that the clip silences."""

    def objective(
        stats: TokenStats,  # of C tokens
        *,
        advantage: Tensor,  # (C,)
        old_logprob: Tensor,  # (C,) log q_old(y_t)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = (stats.student_logprob - old_logprob).exp()
        loss, silenced = clipped_policy_loss(ratio, advantage, cliprange)
        metrics = {"policy_ratio": ratio.detach()}
        if cliprange is not None:
            metrics["clipped_share"] = silenced.to(ratio.dtype)
        return loss, metrics

    return objective


class OnPolicyDistillation(Method):
    """See the module."""

    def __init__(self, config):
        super().__init__(config)
        self.task_reward = config.method.task_reward_function()
        self.objective = policy_objective(config.method.cliprange)
        self.means: dict[str, float] = {}  # over the answers of the buffer in use

    def collect(self, data: TrainingData, models: Models, draw: int) -> RolloutBuffer:
        """Sample answers from the student, score them once under both models, and keep their advantages."""
        rollout = self.config.rollout
        examples = data.prompts.take(rollout.buffer_size // self.answers_per_prompt) * self.answers_per_prompt
        if self.task_reward is not None and not self.means:  # what is wrong with it, before the first answer is sampled
            self._rewards(examples[:1], ["".join(examples[0].references[:1])], data)
        keys, judges = [example.index for example in examples], [example.judge for example in examples]
        answers = sample_answers([example.sequence for example in examples], data, self.config, draw=draw)
        rewards = None
        with data.timing.of("scoring"):
            buffer = score(models, answers, keys=keys, judges=judges, batch_size=rollout.batch_size)
            if self.task_reward is not None:
                texts = [models.tokenizer.decode(answer.response, skip_special_tokens=True) for answer in answers]
                rewards = self._rewards(examples, texts, data)
        self.means = self._means(buffer, rewards)
        self._keep_advantages(buffer, rewards)
        return buffer

    def _rewards(self, examples: Sequence[Example], answers: Sequence[str], data: TrainingData) -> list[float]:
        """The task reward of every answer: one call on one rank, so that it is the same number on all of them."""

        def call() -> list[float]:
            rewards = []
            for example, answer in zip(examples, answers, strict=True):
                rewards.append(self._reward(example, answer))
                data.report_progress("rewarding answers", len(rewards), len(examples))
            return rewards

        return collectives.on_rank_0(call)

    def _reward(self, example: Example, answer: str) -> float:
        record = {"index": example.index, "references": list(example.references)}
        named = f"method.task_reward: {self.config.method.task_reward}"
        where = f"for an answer to prompt {example.index + 1} of data.prompts"
        try:
            reward: Any = self.task_reward(example.prompt, answer, record)
        except Exception as problem:
            place = traceback.extract_tb(problem.__traceback__)[-1]
            raise UserError(
                f"{named} raised {type(problem).__name__} {where}: {problem} ({place.filename}, line {place.lineno}); it must "
                "return a number for any text"
            ) from problem
        if not isinstance(reward, Real) or not math.isfinite(reward):
            raise UserError(
                f"{named} returned {reward!r} ({type(reward).__name__}) {where}; it must return a finite number, such as 0.0 "
                f"for an answer that it cannot judge. The answer: {answer[:80]!r}"
            )
        return float(reward)

    def _keep_advantages(self, buffer: RolloutBuffer, rewards: Sequence[float] | None) -> None:
        """Leave `advantage` and `old_logprob`, (T,) fp32 each, in the rollouts: a step needs nothing else of the teacher."""
        weight = self.config.method.task_reward_weight
        for rollout, reward in zip(buffer, rewards or [0.0] * len(buffer), strict=True):
            old, judged = (rollout.vectors[f"{who}_logprob"] for who in ("student", "teacher"))
            advantage = self._sampling_weight(rollout.vectors) * (judged.double() - old.double() + weight * reward)
            rollout.vectors = {"advantage": advantage.float(), "old_logprob": old}
            rollout.teacher = {}

    def _means(self, buffer: RolloutBuffer, rewards: Sequence[float] | None) -> dict[str, float]:
        """The means of a scored buffer: the reverse KL of its tokens, sampled and exact, and its task reward."""
        vectors = {name: torch.cat([one.vectors[name] for one in buffer]).double() for name in buffer[0].vectors}
        sampled = self._sampling_weight(vectors) * (vectors["student_logprob"] - vectors["teacher_logprob"])
        means = {
            "sampled_reverse_kl_nats": sampled.mean().item(),
            "reverse_kl_nats": vectors["reverse_kl"].mean().item(),
        }
        return means if rewards is None else {**means, "task_reward": math.fsum(rewards) / len(rewards)}

    def _sampling_weight(self, vectors: Mapping[str, Tensor]) -> Tensor:  # (T,) float64
        """w of T tokens, exactly 1 at temperature 1: of sampling and scoring the log-probabilities differ by rounding."""
        old, drawn = (vectors[f"{who}_logprob"].double() for who in ("student", "mixture"))
        return torch.ones_like(old) if self.config.rollout.temperature == 1.0 else (old - drawn).exp()

    def terms(self, items: Sequence[Rollout], data: TrainingData, models: Models) -> list[Term]:
        batch = collate([item.sequence for item in items], models.pad_id)
        vectors = {name: torch.cat([item.vectors[name] for item in items]) for name in ("advantage", "old_logprob")}
        count = float(len(batch.labels))
        return [Term("policy", batch, self.objective, ("student_logprob",), count, inputs=vectors)]

    def observe(self, observation: Observation) -> dict[str, float]:
        return dict(self.means) if observation.kind == "step" else {}

    def state_dict(self) -> dict[str, Any]:
        return {"means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.means = dict(state["means"])


METHOD = OnPolicyDistillation
