"""Every loss on full logits, in plain torch and any dtype: the specification that tests and benchmarks share.

Written from the definitions, with autograd for gradients, and sharing no code with the fused path. In float64 it is
the oracle. p is the teacher's row, q the student's; 0 log 0 = 0; ids that both models give -inf do not exist.
"""

import math

import torch
from torch import Tensor


def logits(
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None = None,  # (V,)
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """softcap(logit_scale * (h W^T + b)) / temperature, (N, V); a logit of -inf stays -inf through the softcap."""
    raw = hidden @ weight.t()
    if bias is not None:
        raw = raw + bias
    z = raw * logit_scale
    if softcap is not None:
        banned = raw == -math.inf
        z = torch.where(banned, -math.inf, softcap * torch.tanh(z.masked_fill(banned, 0.0) / softcap))
    return z / temperature


def _terms(weights: Tensor, log_ratio: Tensor) -> Tensor:
    """weights * log_ratio, 0 where the weight is that of an impossible id."""
    impossible = weights == 0
    return torch.where(impossible, 0.0, weights * log_ratio.masked_fill(impossible, 0.0))


def _interpolated(student: Tensor, teacher: Tensor, weight: float) -> Tensor:
    """(1 - weight) z_s + weight z_t; a model of weight 0 bans nothing."""
    if weight in (0, 1):
        return teacher if weight else student
    return (1 - weight) * student + weight * teacher


def token_stats(
    student: Tensor,  # (N, V) logits z_s
    teacher: Tensor | None,  # (N, V) logits z_t
    labels: Tensor | None,  # (N,) in [0, V)
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    interpolation: float = 0.4,
) -> dict[str, Tensor]:
    """Every statistic of minillm.losses.TokenStats that the arguments allow, (N,) each, in nats."""
    rows = torch.arange(student.shape[0], device=student.device)
    log_q = student.log_softmax(-1)
    q = log_q.exp()
    result = {"student_entropy": -_terms(q, log_q).sum(-1), "student_argmax": student.argmax(-1)}
    if labels is not None:
        result["student_logprob"] = log_q[rows, labels]
    if teacher is None:
        return result
    log_p = teacher.log_softmax(-1)
    p = log_p.exp()
    result["teacher_entropy"] = -_terms(p, log_p).sum(-1)
    result["teacher_argmax"] = teacher.argmax(-1)
    if labels is not None:
        result["teacher_logprob"] = log_p[rows, labels]

    nowhere = (log_p == -math.inf) & (log_q == -math.inf)  # the derivative of logaddexp there is NaN

    def mixture(weight: float) -> Tensor:  # log(weight p + (1 - weight) q)
        ours, theirs = log_q.masked_fill(nowhere, 0.0), log_p.masked_fill(nowhere, 0.0)
        return torch.logaddexp(theirs + math.log(weight), ours + math.log1p(-weight))

    result["reverse_kl"] = _terms(q, log_q - log_p).sum(-1)
    result["forward_kl"] = _terms(p, log_p - log_q).sum(-1)
    m = mixture(beta)
    result["jsd"] = beta * _terms(p, log_p - m).sum(-1) + (1 - beta) * _terms(q, log_q - m).sum(-1)
    result["skew_forward_kl"] = _terms(p, log_p - mixture(alpha)).sum(-1)
    result["skew_reverse_kl"] = _terms(q, log_q - mixture(1 - alpha)).sum(-1)
    result["tvd"] = 0.5 * (p - q).abs().sum(-1)
    target = _interpolated(student.detach(), teacher, interpolation).softmax(-1)
    result["interpolated_cross_entropy"] = -_terms(target, log_q).sum(-1)
    return result


def top_k_token_stats(
    student: Tensor,  # (N, V) logits z_s
    ids: Tensor,  # (N, k)
    logprobs: Tensor,  # (N, k) log p of these ids, in the dtype that they were rounded to
    labels: Tensor | None,  # (N,) in [0, V)
    *,
    beta: float = 0.5,
    alpha: float = 0.1,
    interpolation: float = 0.4,
    least_tail: float = 2.0**-23,  # 2**-52 where everything is float64
) -> dict[str, Tensor]:
    """Every statistic of minillm.losses.TokenStats that a TopK can say, (N,) each, in nats.

    Divergences are those of k + 1 outcomes: the ids, and all others together. teacher_logprob is NaN where the label is
    not among the ids, teacher_argmax -1 where an id of the tail could be likelier.
    """
    inside = torch.zeros_like(student, dtype=torch.bool).scatter(1, ids, True)
    tail = student.masked_fill(inside, -math.inf)
    empty = (tail == -math.inf).all(1)
    z_tail = tail.masked_fill(empty[:, None], 0.0).logsumexp(1).masked_fill(empty, -math.inf)

    log_p = logprobs.to(torch.float64)
    p = log_p.exp()
    left = 1 - p.sum(1)
    eps = torch.finfo(logprobs.dtype).eps
    rounding = least_tail - eps / 2 * _terms(p, log_p).sum(1)
    p_tail = torch.where(empty, torch.where(left > 1e-4 + 8 * eps, left, 0.0), torch.maximum(left, rounding))

    outcomes = torch.cat((student.gather(1, ids), z_tail[:, None]), 1)
    teacher = torch.cat((log_p, p_tail.log()[:, None]), 1).to(student.dtype)
    divergences = token_stats(outcomes, teacher, None, beta=beta, alpha=alpha, interpolation=interpolation)
    result = token_stats(student, None, labels)
    result |= {name: value for name, value in divergences.items() if not name.startswith(("student_", "teacher_"))}
    if labels is not None:
        at = ids == labels[:, None]
        known = torch.where(at, log_p, 0.0).sum(1)
        result["teacher_logprob"] = known.masked_fill(~at.any(1), math.nan)
    best, place = p.max(1)
    certain = (best > left) | (ids.shape[1] == student.shape[1])
    result["teacher_argmax"] = ids.gather(1, place[:, None])[:, 0].masked_fill(~certain, -1)
    return result
