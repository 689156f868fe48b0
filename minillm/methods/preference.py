"""The loss of a preference between two answers, of which DPO, IPO, DPOP, SimPO and KTO's for pairs are special cases.

For a chosen answer w and a rejected one l, with the teacher p as the reference of the student q:

    s(y) = sum_t log q(y_t) / p(y_t), divided by the length |y| with length_norm; p is left out with reference_free
    d = s(w) - s(l) - dpop * max(0, -s(w)),    margin = beta (s(w) - s(l))
    sigmoid  L = -(1 - e) log sigmoid(beta d - g) - e log sigmoid(g - beta d)     e label_smoothing, g target_margin
    ipo      L = (d - 1 / (2 beta))^2
    kto_pair L = (sigmoid(-beta (s(w) - max(0, s(l)))) + sigmoid(-beta (max(0, s(w)) - s(l)))) / 2

In kto_pair the positive part of the other answer's score stands for the KL to the reference, as in the released code of
LLaVA-MoD (arXiv 2408.15881) at its batch of one pair: with its gradient, which KTO (2402.01306) leaves out. Over larger
batches that code takes its mean over the micro-batch; here a pair is by itself, whatever it is batched with. As long as the
student is less sure than its reference, s(w) < 0 < s(l), that gradient makes kto_pair push the rejected answer down harder
than it pulls the chosen one up: answers that the student cannot tell apart lose probability together, to whatever is none of
them. Under sigmoid and ipo the two cancel out.

DPO is arXiv 2305.18290 (smoothed: its conservative form), IPO 2310.12036 (equation 17), DPOP 2402.13228 (equation 3),
SimPO 2405.14734 (equation 6).
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from minillm.config.preference_keys import PreferenceKeys
from minillm.data.pairs import AnswerPair
from minillm.losses import TokenStats
from minillm.methods.protocol import Term
from minillm.models.batch import TokenBatch, collate
from minillm.teachers.pair import Models
from minillm.teachers.teacher import require_teacher

PAIRS = "pairs_per_token"  # what turns the means over rows that an engine reports into means over pairs
PER_PAIR = ("margin", "preferred")


def preference_loss(
    chosen: Tensor,  # (P,) s(w), differentiable
    rejected: Tensor,  # (P,) s(l), differentiable
    keys: PreferenceKeys,
) -> tuple[Tensor, Tensor]:  # (P,) each
    """The loss of each pair and its margin, which carries no gradient; see the module."""
    difference = chosen - rejected
    margin = keys.beta * difference.detach()
    if keys.dpop > 0:
        difference = difference - keys.dpop * torch.relu(-chosen)
    if keys.preference_loss == "ipo":
        return (difference - 1 / (2 * keys.beta)).square(), margin
    if keys.preference_loss == "kto_pair":
        first = torch.sigmoid(-keys.beta * (chosen - torch.relu(rejected)))
        second = torch.sigmoid(-keys.beta * (torch.relu(chosen) - rejected))
        return (first + second) / 2, margin
    logit = keys.beta * difference - keys.target_margin
    loss = (1 - keys.label_smoothing) * softplus(-logit)
    if keys.label_smoothing > 0:
        loss = loss + keys.label_smoothing * softplus(logit)
    return loss, margin


def log_ratio(stats: TokenStats, keys: PreferenceKeys) -> Tensor:  # (N,)
    """log q(y) / p(y) of every row, or log q(y) with reference_free."""
    return stats.student_logprob if keys.reference_free else stats.student_logprob - stats.teacher_logprob


def ratio_fields(keys: PreferenceKeys) -> tuple[str, ...]:
    """The statistics that log_ratio reads."""
    return ("student_logprob",) if keys.reference_free else ("student_logprob", "teacher_logprob")


def preference_term(
    pairs: Sequence[AnswerPair],
    models: Models,
    keys: PreferenceKeys,
    *,
    name: str = "preference",
    weight: float = 1.0,
    reference: Tensor | None = None,  # (P, 2)
) -> Term:
    """The mean of the loss over the pairs of the step. `pair_means` turns what the step reports of it into means over pairs.

    Args: reference: the reference's log-probability of each chosen and rejected answer, where it is known; else the
        teacher is asked.

    Raises UserError without a teacher, unless the keys leave it out or the reference is known.
    """
    batch = collate([one for pair in pairs for one in (pair.chosen, pair.rejected)], models.pad_id)
    lengths = torch.tensor(batch.lengths, dtype=torch.float64).clamp(min=1).view(-1, 2)  # (P, 2)
    known = reference is not None and not keys.reference_free

    def objective(stats: TokenStats) -> tuple[Tensor, dict[str, Tensor]]:
        ratio = stats.student_logprob if known else log_ratio(stats, keys)
        sums = answer_sums(ratio, batch, mean=keys.length_norm).view(-1, 2)  # (P, 2)
        if known:
            sums = sums - (reference / lengths if keys.length_norm else reference).to(sums)
        loss, margin = preference_loss(sums[:, 0], sums[:, 1], keys)
        preferred = (margin > 0).to(margin.dtype)
        return loss, {"margin": margin, "preferred": preferred, PAIRS: torch.ones_like(margin)}

    teacher = None
    fields = ("student_logprob",) if known else ratio_fields(keys)
    if not known and not keys.reference_free:
        require_teacher(models.teacher, f"the term {name!r}")
        teacher = models.teacher.rows(batch)
    return Term(name, batch, objective, fields, float(len(pairs)), weight, teacher=teacher, coupled=True)


def answer_sums(vector: Tensor, batch: TokenBatch, *, mean: bool) -> Tensor:  # (N,) -> (B,)
    """The sum, or the mean, over the rows of every answer; 0 for an answer without tokens.

    Added up an answer at a time: a scattered sum would not have the same bits twice on a GPU.
    """
    parts = batch.split(vector)
    return torch.stack([part.sum() / max(len(part), 1) if mean else part.sum() for part in parts])


def pair_means(metrics: Mapping[str, float]) -> dict[str, float]:
    """The means over pairs of what a step with a preference_term reports."""
    return {name: metrics[name] / metrics[PAIRS] for name in PER_PAIR}
