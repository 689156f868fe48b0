"""Direct preference knowledge distillation (DPKD, arXiv 2406.19774), as published, as released, and on given pairs.

The paper (equation 15, algorithm 1) prefers an answer of the teacher to one of the student, both sampled, with the
teacher as the reference and every log-ratio divided by the length of its answer. The released code samples nothing. It
compares, at every token of given texts, the id a that the teacher finds likeliest with the one, b, that the student does:

    L = -log sigmoid(beta (log q(a)/p(a) - log q(b)/p(b))) - ce_coef * log q(y), mean over response tokens

Where a is b the first part is log 2 without a gradient. A third form takes the pairs from data.pairs, and the teacher,
which may be the student's own beginning, is their reference alone: with the keys of `preference` it is DPO, IPO, DPOP or
SimPO, and the preference stage of LLaVA-MoD (arXiv 2408.15881: length_norm false, lm_coef 0). All forms add a loss on
plain text with weight lm_coef; the released weights of the three parts, 1/2 each, are ce_coef 1, lm_coef 1 and
pt_kd_ratio 0.5 at half the size.

Differences from the released code. It takes log-softmaxes in bf16, which changes the ids on near ties; here they are
fp32. It takes an id with a logit of -inf for the student's likeliest; here it is never one. Its DPOP adds
lambda max(0, log p(a)/q(a)) beside the sigmoid, where the paper of DPOP, and this, subtracts it inside. Its SimPO
multiplies the loss by 51.2 and is not offered; reference_free and target_margin are SimPO's own form.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from minillm.config.methods.dpkd_keys import DPKD
from minillm.data.pairs import AnswerPair
from minillm.losses import TokenStats
from minillm.methods.on_policy import sampled_pairs
from minillm.methods.preference import (
    log_ratio,
    pair_means,
    preference_loss,
    preference_term,
    ratio_fields,
)
from minillm.methods.protocol import Item, Method, Objective, Observation, Term, TrainingData, sequences_of
from minillm.methods.reference_scores import ReferenceScores
from minillm.methods.supervised import pretraining_term, take_references
from minillm.models.batch import collate
from minillm.rollout.scoring import batch_statistics
from minillm.teachers.pair import Models
from minillm.teachers.teacher import require_teacher


class PreferenceDistillation(Method):
    """See the module; method.pairs chooses between the forms."""

    def __init__(self, config):
        super().__init__(config)
        keys = config.method
        self.reference = ReferenceScores() if keys.pairs == "data" and not keys.reference_free else None

    def collect(self, data: TrainingData, models: Models, draw: int) -> Sequence[Item]:
        """Texts for the token form; else pairs, given or of an answer of each model to each of the next prompts."""
        if self.config.method.pairs == "data":
            return self._given_pairs(data, models)
        if self.config.method.pairs == "token_argmax":
            return take_references(data, self.step_size)
        return sampled_pairs(take_references(data, self.step_size), data, self.config, draw=draw)

    def _given_pairs(self, data: TrainingData, models: Models) -> list[AnswerPair]:
        pairs = data.pairs.take(self.step_size)
        if self.reference is not None:
            with data.timing.of("scoring"):
                self.reference.add(pairs, models, batch_size=self.config.train.per_device_train_batch_size)
        return pairs

    def terms(self, items: Sequence[Item], data: TrainingData, models: Models) -> list[Term]:
        keys = self.config.method
        if keys.pairs == "token_argmax":
            terms = [token_term(items, models, keys)]
        else:
            known = None if self.reference is None else self.reference.of(items)
            terms = [preference_term(items, models, keys, reference=known)]
        if keys.lm_coef > 0:
            terms.append(pretraining_term(len(items), data, models, weight=keys.lm_coef, kd_ratio=keys.pt_kd_ratio))
        return terms

    def observe(self, observation: Observation) -> dict[str, float]:
        """The margin of the step: a mean over pairs, but in the token form over tokens."""
        if observation.kind != "step" or self.config.method.pairs == "token_argmax":
            return {}
        return pair_means(observation.metrics)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.reference is None else self.reference.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.reference is None:
            super().load_state_dict(state)
        else:
            self.reference.load_state_dict(state)


def token_term(items: Sequence[Item], models: Models, keys: DPKD) -> Term:
    """The token form's loss. One forward pass of each model says which ids are compared, another of the student what they cost.

    Every row is predicted two or three times: a, b and, with ce_coef, the text's own id.
    """
    require_teacher(models.teacher, "the term 'preference'")
    batch = collate(sequences_of(items), models.pad_id).to(models.device)
    teacher = models.teacher.rows(batch)
    with torch.no_grad(), models.reading("student"):
        stats = batch_statistics(models, batch, teacher, ("teacher_argmax", "student_argmax"))
    labels = [stats.teacher_argmax, stats.student_argmax, *[batch.labels] * (keys.ce_coef > 0)]
    times = len(labels)
    return Term(
        "preference",
        replace(batch, rows=batch.rows.repeat(times), labels=torch.cat(labels)),
        token_objective(keys),
        ratio_fields(keys),
        count=float(len(batch.labels)),
        teacher=models.teacher.rows_of(
            {name: part.repeat(times, *[1] * (part.dim() - 1)) for name, part in teacher.parts().items()}
        ),
        coupled=True,
    )


def token_objective(keys: DPKD) -> Objective:
    """The loss of N tokens from the statistics of a block of N rows each for a, b and, with ce_coef, the text's own ids."""
    times = 2 + (keys.ce_coef > 0)

    def objective(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:  # (times * N,)
        chosen, rejected = log_ratio(stats, keys).view(times, -1)[:2]  # (N,) each
        loss, margin = preference_loss(chosen, rejected, keys)
        metrics = {"margin": margin}
        if keys.ce_coef > 0:
            cross_entropy = -stats.student_logprob.view(times, -1)[2]
            loss = loss + keys.ce_coef * cross_entropy
            metrics["cross_entropy_nats"] = cross_entropy.detach()
        return loss, metrics

    return objective


METHOD = PreferenceDistillation
