"""MiniLLM (arXiv 2306.08543): the policy gradient of the sequence-level reverse KL, split as its section 2.2 does.

    grad KL(q || p) = - E_{y ~ p~} sum_t [ w_t grad sum_v q(v) log p(v)/q(v)       single step, exact over the vocabulary
                                         + w_t R_{t+1} grad log q(y_t) ]           what follows, from the sampled rewards
    r_t = log p(y_t) - log q(y_t),    p~ = alpha p + (1 - alpha) q,    w_t = q(y_t) / p~(y_t)

The policy gradient is clipped as in PPO, and each buffer of answers is used for several epochs. A loss on plain text
(data.corpus) is added with weight lm_coef. tests/methods/test_minillm_exactness.py shows on an enumerated language
model which settings make this gradient exact.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.config.methods.minillm_keys import MiniLLM
from minillm.losses import TokenStats
from minillm.methods.on_policy import clipped_policy_loss, sample_answers
from minillm.methods.protocol import Method, Term, TrainingData
from minillm.methods.returns import discounted_returns, importance_weights, shape_rewards, whiten
from minillm.methods.supervised import pretraining_term
from minillm.models.batch import collate
from minillm.rollout.buffer import Rollout, RolloutBuffer
from minillm.rollout.scoring import score
from minillm.teachers.pair import Models

SCORED = ("student_logprob", "teacher_logprob")  # the reverse KL is measured anew in every epoch
VECTORS = ("advantage", "policy_weight", "single_step_weight")


def add_advantages(rollouts: Sequence[Rollout], method: MiniLLM) -> None:
    """Put `advantage`, `policy_weight` and `single_step_weight`, (T,) fp32 each, into the rollouts' vectors."""
    advantages, weights = [], []
    for rollout in rollouts:
        vectors = rollout.vectors
        rewards = vectors["teacher_logprob"].double() - vectors["student_logprob"].double()
        rewards = shape_rewards(rewards, scaling=method.reward_scaling, cliprange=method.cliprange_reward)
        reward_weight, policy_weight, single_step_weight = importance_weights(
            vectors["student_logprob"], vectors["mixture_logprob"], method.importance_weight
        )
        advantages.append(
            discounted_returns(
                rewards * reward_weight,
                gamma=method.gamma,
                start=method.return_from,
                length_norm=method.length_norm,
            )
        )
        if not method.single_step_weighted:
            single_step_weight = torch.ones_like(single_step_weight)
        weights.append((policy_weight, single_step_weight))
    whitened = whiten(advantages, over=method.whiten)
    for rollout, advantage, (policy_weight, single_step_weight) in zip(rollouts, whitened, weights, strict=True):
        rollout.vectors["advantage"] = advantage.float()
        rollout.vectors["policy_weight"] = policy_weight.float()
        rollout.vectors["single_step_weight"] = single_step_weight.float()


def policy_objective(method: MiniLLM):
    """The per-token loss: clipped policy gradient plus weighted single-step reverse KL (the module's formula)."""

    def objective(
        stats: TokenStats,  # of C tokens
        *,
        advantage: Tensor,  # (C,)
        policy_weight: Tensor,  # (C,)
        single_step_weight: Tensor,  # (C,)
        old_logprob: Tensor,  # (C,) log q_old(y_t)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = (stats.student_logprob - old_logprob).exp()
        if method.importance_weight_in_clip:
            ratio = ratio * policy_weight
        policy, silenced = clipped_policy_loss(ratio, advantage, method.cliprange)
        if not method.importance_weight_in_clip:
            policy = policy * policy_weight
        loss = policy
        if method.single_step:
            loss = loss + single_step_weight * stats.reverse_kl
        return loss, {
            "policy_loss": policy.detach(),
            "reverse_kl_nats": stats.reverse_kl.detach(),
            "entropy_nats": stats.student_entropy.detach(),
            "clipped_share": silenced.to(ratio.dtype),
        }

    return objective


class MiniLLMMethod(Method):
    """See the module; every difference between the paper and its released code is a key of `method`."""

    def __init__(self, config):
        super().__init__(config)
        self.objective = policy_objective(config.method)

    def collect(self, data: TrainingData, models: Models, draw: int) -> RolloutBuffer:
        """Sample answers from p~, score them once under both models, and compute their advantages."""
        rollout, alpha = self.config.rollout, self.config.method.alpha
        examples = data.prompts.take(rollout.buffer_size // self.answers_per_prompt)
        prompts = [example.sequence for example in examples] * self.answers_per_prompt
        keys, judges = [prompt.key for prompt in prompts], [prompt.judge for prompt in prompts]
        who = "mixture" if alpha > 0 else "student"
        answers = sample_answers(prompts, data, self.config, draw=draw, alpha=alpha, who=who)
        with data.timing.of("scoring"):
            buffer = score(
                models,
                answers,
                keys=keys,
                judges=judges,
                batch_size=rollout.batch_size,
                fields=SCORED,
                from_student=self.needs.as_drawn,
            )
        add_advantages(buffer, self.config.method)
        return buffer

    def terms(self, items: Sequence[Rollout], data: TrainingData, models: Models) -> list[Term]:
        method = self.config.method
        batch = collate([item.sequence for item in items], models.pad_id)
        vectors = {name: torch.cat([item.vectors[name] for item in items]) for name in VECTORS}
        vectors["old_logprob"] = torch.cat([item.vectors["student_logprob"] for item in items])
        policy = Term(
            name="policy",
            batch=batch,
            objective=self.objective,
            fields=("student_logprob", "reverse_kl", "student_entropy"),
            count=float(len(items) if method.reduction == "sequences" else len(batch.labels)),
            inputs=vectors,
            teacher=models.teacher.rows_of(
                {name: torch.cat([item.teacher[name] for item in items]) for name in items[0].teacher}
            ),
        )
        if method.lm_coef == 0:
            return [policy]
        keys = {"weight": method.lm_coef, "kd_ratio": method.pt_kd_ratio}
        return [policy, pretraining_term(len(items), data, models, **keys)]


METHOD = MiniLLMMethod
