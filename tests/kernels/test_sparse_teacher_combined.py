"""A TopK teacher beside what else the losses offer: students that are sums of heads, coupled objectives, TAID's target."""

import math

import pytest
import torch
import torch.nn.functional as F

from minillm.kernels import reference
from minillm.losses import LMHead, TopK, linear_divergence, linear_objective, linear_token_stats
from tests.kernels.contract import assert_close, gradients, objective_of, stats_of
from tests.kernels.test_head_sum import (
    CAPPED,
    CHUNK,
    KINDS,
    TEMPERATURE,
    compare,
    exact_logits,
    joined,
    labels_of,
    parts,
)
from tests.kernels.top_k import FIELDS, expected_gradients, oracle, sparse, weights_of

NAME = "interpolated_cross_entropy"
K = 6


def likeliest(made, rows) -> TopK:
    with torch.no_grad():
        found = exact_logits(made, rows).log_softmax(1).topk(K, 1)
    return TopK(found.indices, found.values.float(), temperature=TEMPERATURE)


# every entry with both parts trained, and each way to a gradient with either part frozen
@pytest.mark.parametrize(
    ("entry", "frozen"),
    [
        *((entry, ()) for entry in ("objective", "coupled", "coupled in one chunk", "token_stats", "one launch")),
        *((entry, (part,)) for entry in ("coupled", "one launch") for part in (0, 1)),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_summed_student_matches_float64(kind, entry, frozen, backend, kit):
    made, labels = parts(KINDS[kind], kit, frozen=frozen), labels_of(kit)
    top_k = likeliest(parts(({},), kit, seed=1), slice(None))
    arguments = (*joined(made), top_k, None, labels)
    chunk_bytes = None if entry == "coupled in one chunk" else CHUNK
    options = dict(temperature=TEMPERATURE, backend=backend, chunk_bytes=chunk_bytes)
    fields = ("reverse_kl", "student_logprob", NAME)

    def combined(stats):
        return stats["reverse_kl"] - 0.5 * stats["student_logprob"] + 0.3 * stats[NAME]

    if entry == "one launch":
        loss = linear_divergence(*arguments[:4], labels=labels, reduction="sum", **options)
    elif entry == "token_stats":
        loss = combined(vars(linear_token_stats(*arguments, fields=fields, **options))).sum()
    else:
        coupled = entry.startswith("coupled")
        loss, _ = linear_objective(
            *arguments, lambda stats: combined(vars(stats)), fields=fields, coupled=coupled, **options
        )
    kept, doubled = labels != -100, [part.doubled() for part in made]
    stats = reference.top_k_token_stats(
        exact_logits(doubled, kept), top_k.ids[kept], top_k.logprobs[kept], labels[kept]
    )
    compare(loss, made, (stats["reverse_kl"] if entry == "one launch" else combined(stats)).sum(), doubled, kit)


def test_a_summed_head_beside_a_top_k_is_refused(kit):
    made, labels = parts(CAPPED, kit), labels_of(kit)
    top_k = likeliest(made, slice(None))
    with pytest.raises(ValueError, match="teacher_head must be None where teacher_hidden is a TopK"):
        linear_token_stats(*joined(made), top_k, LMHead.sum_of(*(part.head for part in made)), labels)


# five rows a chunk, of two passes; and all rows in one, whose logits two row operations read
@pytest.mark.parametrize("chunk_bytes", [None, 4000])
def test_a_coupled_objective_matches_float64(chunk_bytes, backend, kit):
    case = sparse(kit.make_case(rows=(4, 6), bias=True, student_options={"softcap": 6.0}), 8)

    def pairs(logprob, reverse_kl, jsd):  # (4, 6) each
        wins = logprob[:2].sum(1) - logprob[2:].sum(1)
        return -F.logsigmoid(0.3 * wins).sum() + reverse_kl.sum().square() + jsd.sum(1).exp().sum()

    names = ("student_logprob", "reverse_kl", "jsd")
    loss, _ = linear_objective(
        *case.arguments,
        lambda stats: pairs(*(getattr(stats, name) for name in names)),
        fields=names,
        coupled=True,
        backend=backend,
        chunk_bytes=chunk_bytes,
        **case.options,
    )
    expected, leaves = oracle(case)
    zero = torch.zeros(case.labels.numel(), dtype=torch.float64, device=kit.device)
    index = case.kept.nonzero()[:, 0]
    loss64 = pairs(*(zero.index_copy(0, index, expected[name]).view(4, 6) for name in names))
    assert loss.item() == pytest.approx(loss64.item(), rel=1e-6)
    exact = torch.autograd.grad(loss64, list(leaves.values()))
    assert_close(gradients(loss, case), dict(zip(leaves, exact, strict=True)), 1e-5, kit)


@pytest.mark.parametrize("chunk_bytes", [None, 4000])
def test_every_coefficient_of_a_coupled_objective(chunk_bytes, backend, kit):
    case = sparse(kit.make_case(bias=True), 8)
    weights = weights_of(case, FIELDS)
    loss = objective_of(case, backend, weights, coupled=True, chunk_bytes=chunk_bytes)
    assert_close(gradients(loss, case), expected_gradients(case, weights)[1], 1e-5, kit)


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_the_interpolated_target_over_outcomes(t, backend, kit):
    case = sparse(kit.make_case(bias=True, interpolation=t), 8)
    expected, leaves = oracle(case)
    value = getattr(stats_of(case, backend, fields=(NAME,)), NAME)
    assert kit.relative_error(value[case.kept], expected[NAME]) < 1e-6
    actual = gradients(value.sum(), case)
    if t == 0:  # the target is the student's own
        assert all(gradient.abs().max() < 2e-6 for gradient in actual.values())
        return
    exact = torch.autograd.grad(expected[NAME].sum(), list(leaves.values()))
    assert_close(actual, dict(zip(leaves, exact, strict=True)), 1e-5, kit)


def test_the_interpolated_target_is_that_of_a_teacher_with_the_students_tail(backend, kit):
    """The gradient is the one of full logits, whose teacher gives ids of the tail p_tail in the student's proportions."""
    case = sparse(kit.make_case(ignored=0.0), 8)
    q = (case.student_hidden.detach().double() @ case.student_weight.detach().double().t()).softmax(1)
    ids, p = case.top_k.ids, case.top_k.logprobs.double().exp()
    tail = q.scatter(1, ids, 0.0)
    whole = (tail / tail.sum(1, keepdim=True) * (1 - p.sum(1, keepdim=True))).scatter(1, ids, p)
    options = dict(fields=(NAME,), backend=backend, interpolation=0.4)
    found = getattr(linear_token_stats(*case.arguments, **options), NAME).sum()
    eye = torch.eye(whole.shape[1], device=kit.device)
    dense = linear_token_stats(*case.arguments[:2], whole.log().float(), eye, case.labels, **options)
    assert_close(gradients(found, case), gradients(getattr(dense, NAME).sum(), case), 1e-5, kit)


@pytest.mark.parametrize("place", [2, 7])
def test_the_interpolated_target_leaves_out_what_the_student_bans(place, backend, kit):
    """Among the ids, or in the tail: q - p_t of the outcomes, in the tail in the student's proportions."""
    case = sparse(kit.make_case(rows=4, vocab=12, hidden=5, bias=True, ignored=0.0, interpolation=0.4), 4)
    case.top_k.ids.copy_(torch.arange(4, device=kit.device))
    case.student_bias.data[place] = -math.inf
    value = getattr(stats_of(case, backend, fields=(NAME,)), NAME)
    assert kit.relative_error(value, oracle(case)[0][NAME]) < 2e-6
    q = (case.student_hidden.double() @ case.student_weight.double().t() + case.student_bias.double()).softmax(1)
    q, p = q.detach(), case.top_k.logprobs.double().exp()
    coarse = torch.cat((q[:, :4], q[:, 4:].sum(1, keepdim=True)), 1)
    target = coarse**0.6 * torch.cat((p, 1 - p.sum(1, keepdim=True)), 1) ** 0.4
    difference = coarse - target / target.sum(1, keepdim=True)
    dz = torch.cat((difference[:, :4], difference[:, 4:] * q[:, 4:] / coarse[:, 4:]), 1)
    actual = gradients(value.sum(), case)
    assert actual["bias"][place] == 0 and (actual["weight"][place] == 0).all()
    assert kit.relative_error(actual["bias"], dz.sum(0)) < 1e-5
    assert kit.relative_error(actual["hidden"], dz @ case.student_weight.double()) < 1e-5
