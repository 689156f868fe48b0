"""Groups of tokens that a student and a teacher with other tokens write for the same bytes, compared (GOLD, Hugging Face 2025).

A group is some tokens of each side that stand for the same bytes: s_1..s_m of the student, t_1..t_n of the teacher. By the
chain rule each side says how likely the group's beginning is, and what follows it there:

    a_v = q(s_1) ... q(s_{m-1}) q_m(v),   b_u = p(t_1) ... p(t_{n-1}) p_n(u)

which with "another beginning", a_0 = 1 - q(s_1) ... q(s_{m-1}) and b_0, add up to 1. Pairs M of outcomes mean the same:
those of the ids that match, where both beginnings have the same bytes, and elsewhere the group itself, (s_m, t_n), alone.

    L = w JSD_beta(b || a over M and "any other") + (1 - w) sum_i |b_(i) - a_(i)| over the outcomes that are not in M

beta 0 is the forward KL and 1 the reverse KL. The released code has no a_0, so that its rows do not add up to 1 and its JSD
can be negative; it pairs matching ids whatever their beginnings are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minillm.kernels.head import LMHead, fp16_headroom
from minillm.kernels.linear_losses import linear_logprobs
from minillm.kernels.objective import attach_gradients, linear_objective
from minillm.kernels.rows_torch import logits_from_raw
from minillm.kernels.sorted_distance import add_gradient, prepare_both, raw_gradient, sorted_distance

BUFFERS = 20  # of the vocabularies' size in fp32, alive at a time: what autograd keeps of a chunk, and its gradients


class Side(NamedTuple):
    """One model's tokens of G groups, of which K are not the last of theirs."""

    hidden: Tensor  # (N, H), rows of tokens
    head: LMHead  # weight (V, H)
    last: Tensor  # (G,) int64, the row of each group's last token
    last_labels: Tensor  # (G,) int64, that token
    before: Tensor  # (K,) int64, the rows of the tokens before the last
    before_labels: Tensor  # (K,) int64
    before_groups: Tensor  # (K,) int64, the groups that these belong to


class Matches(NamedTuple):
    """The ids that mean the same to both, and the groups in which they do. Those that a head has no row for do not count."""

    student: Tensor  # (M,) int64
    teacher: Tensor  # (M,) int64
    same_beginning: Tensor  # (G,) bool: both sides' tokens before the last have the same bytes, or there are none


def linear_group_distance(
    student: Side,
    teacher: Side,
    matches: Matches,
    *,
    beta: float = 0.5,
    matched_weight: float = 0.5,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum over groups of L, and of its two parts: `matched_divergence_nats` and `unmatched_distance`. Scalars, fp32.

    The gradient with respect to the student's hidden states, weight and bias is computed here, a chunk of groups at a time,
    and scaled in the backward pass. The teacher is a constant.

    Args:
        beta: of the divergence, from 0 to 1.
        matched_weight: w.
        chunk_bytes: bytes of what is alive at a time; None fits them to the device.

    Raises ValueError for arguments that do not fit each other, which are named.
    """
    with torch.no_grad():
        beginnings = [_beginnings(side) for side in (student, teacher)]
    last = student.hidden[student.last]
    (ours, tensors), (theirs, constants) = prepare_both(
        last, student.head, teacher.hidden[teacher.last], teacher.head, buffers=BUFFERS, chunk_bytes=chunk_bytes
    )
    known = (matches.student < ours.vocab_size) & (matches.teacher < theirs.vocab_size)
    matches = matches._replace(student=matches.student[known], teacher=matches.teacher[known])
    needs = tuple(torch.is_grad_enabled() and one is not None and one.requires_grad for one in tensors.leaves)
    into, dtype = (ours.logits,), ours.logits
    total = torch.zeros(3, dtype=dtype, device=last.device)
    by_beginning = torch.zeros_like(beginnings[0])
    with torch.no_grad(), torch.autocast(last.device.type, enabled=False):
        sums = ours.gradients(tensors, needs, into)
        headroom = 1.0 if sums is None else fp16_headroom(sums.dz_dtype)
        for mine, other in zip(ours.chunks(tensors, sums=sums), theirs.chunks(constants), strict=True):
            rows = mine.slice
            z = logits_from_raw(mine.student, ours.spec.student_scale, ours.spec.student_softcap, 1.0).detach()
            z_t = logits_from_raw(other.student, theirs.spec.student_scale, theirs.spec.student_softcap, 1.0)
            leaves = z.requires_grad_(sums is not None), beginnings[0][rows].detach().requires_grad_(sums is not None)
            with torch.set_grad_enabled(sums is not None):
                divergence, distance = group_distance(
                    *leaves,
                    student.last_labels[rows],
                    z_t,
                    beginnings[1][rows],
                    teacher.last_labels[rows],
                    Matches(matches.student, matches.teacher, matches.same_beginning[rows]),
                    beta=beta,
                )
                value = (matched_weight * divergence + (1 - matched_weight) * distance).sum()
            if sums is not None:
                dz, by_beginning[rows] = torch.autograd.grad(value, leaves)
                add_gradient(sums, raw_gradient(dz, mine.student, ours.spec), mine, headroom)
            total += torch.stack([value.detach(), divergence.detach().sum(), distance.detach().sum()])
        if headroom != 1.0:
            sums.scale(1 / headroom)
    loss, *parts = total.unbind()
    if sums is not None:
        loss = attach_gradients(loss, into, tensors.leaves, sums)
        loss = loss + _through_beginnings(student, by_beginning)
    return loss, dict(zip(("matched_divergence_nats", "unmatched_distance"), parts, strict=True))


def group_distance(
    z: Tensor,  # (C, V_s) the student's logits after the beginning of each group
    log_beginning: Tensor,  # (C,) log q(s_1) ... q(s_{m-1}), 0 where m is 1
    labels: Tensor,  # (C,) int64, s_m
    teacher_z: Tensor,  # (C, V_t)
    teacher_log_beginning: Tensor,  # (C,)
    teacher_labels: Tensor,  # (C,) int64, t_n
    matches: Matches,
    *,
    beta: float,
) -> tuple[Tensor, Tensor]:  # (C,) each
    """The divergence over the outcomes in M and "any other", and the distance of the sorted ones that are not in M."""
    same = matches.same_beginning
    sides = []
    for logits, beginning, label, ids in (
        (z, log_beginning, labels, matches.student),
        (teacher_z, teacher_log_beginning, teacher_labels, matches.teacher),
    ):
        joint = torch.log_softmax(logits, 1) + beginning[:, None]
        paired = torch.zeros_like(joint, dtype=torch.bool).scatter_(1, label[:, None], True)
        paired[same] = torch.zeros_like(paired[:1]).index_fill_(1, ids, True)
        unpaired = torch.cat([joint.exp().masked_fill(paired, 0.0), -torch.expm1(beginning)[:, None]], 1)
        other = _log(unpaired.sum(1))
        sides.append((joint, unpaired, other, label, ids))
    divergence = torch.zeros_like(log_beginning)
    outcomes = [
        (
            torch.cat([joint[same][:, ids], other[same][:, None]], 1),
            torch.stack([joint[~same].gather(1, label[~same][:, None])[:, 0], other[~same]], 1),
        )
        for joint, _, other, label, ids in sides
    ]
    for rows, a, b in zip((same, ~same), *outcomes, strict=True):
        divergence = divergence.masked_scatter(rows, _divergence(a, b.to(a.dtype), beta))
    distance = _SortedDistance.apply(sides[0][1], sides[1][1].to(z.dtype))
    return divergence, distance


def _beginnings(side: Side) -> Tensor:  # (G,)
    """The log-probability of what comes before the last token of each group."""
    found = linear_logprobs(side.hidden[side.before], side.head, side.before_labels)
    return found.new_zeros(len(side.last)).index_add_(0, side.before_groups, found)


def _through_beginnings(student: Side, by_beginning: Tensor) -> Tensor:  # (G,) -> ()
    """0, with the gradient that the loss has through the log-probabilities of the beginnings."""

    def objective(stats, by_logprob: Tensor) -> Tensor:
        return by_logprob * stats.student_logprob

    value, _ = linear_objective(
        student.hidden[student.before],
        student.head,
        None,
        None,
        student.before_labels,
        objective,
        inputs={"by_logprob": by_beginning[student.before_groups]},
        fields=("student_logprob",),
    )
    return value - value.detach()


def _divergence(log_a: Tensor, log_b: Tensor, beta: float) -> Tensor:  # (R, M + 1) each -> (R,)
    """JSD_beta(b || a) = beta KL(b || m) + (1 - beta) KL(a || m), m = beta b + (1 - beta) a; at its ends the two KLs."""
    least = torch.finfo(log_a.dtype).tiny
    log_a, log_b = (one.clamp_min(torch.tensor(least, dtype=one.dtype).log().item()) for one in (log_a, log_b))
    a, b = log_a.exp(), log_b.exp()
    if beta == 0:
        return (b * (log_b - log_a)).sum(1)
    if beta == 1:
        return (a * (log_a - log_b)).sum(1)
    log_m = (beta * b + (1 - beta) * a).log()
    return beta * (b * (log_b - log_m)).sum(1) + (1 - beta) * (a * (log_a - log_m)).sum(1)


def _log(probability: Tensor) -> Tensor:
    """log, whose gradient is 0 where there is no probability."""
    return probability.clamp_min(torch.finfo(probability.dtype).tiny).log()


class _SortedDistance(torch.autograd.Function):
    """The distance of `sorted_distance`, with its gradient by q."""

    @staticmethod
    def forward(ctx, q: Tensor, p: Tensor) -> Tensor:  # (C, V_s), (C, V_t) -> (C,)
        distance, _, signs = sorted_distance(q, p)
        ctx.save_for_backward(signs)
        return distance

    @staticmethod
    def backward(ctx, by_distance: Tensor) -> tuple[Tensor, None]:
        (signs,) = ctx.saved_tensors
        return signs * by_distance[:, None], None
