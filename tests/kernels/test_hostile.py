"""The contract of the fused losses on hostile input, over every backend: infinite logits, banned ids, NaN, no rows."""

import math

import pytest
import torch

from minillm.losses import LMHead, linear_divergence, linear_logprobs, linear_objective, linear_token_stats
from tests.kernels.contract import (
    DIFFERENTIABLE,
    FIELDS,
    GRADIENT,
    STATS,
    assert_close,
    central_differences,
    coefficients,
    expected_gradients,
    gradients,
    objective_of,
    stats_of,
)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_huge_logits(offset, backend, kit):
    """Peaked rows, q(y) down to exp(-2e4), and a large common offset of the logits, which no statistic may feel."""
    case = kit.make_case(rows=8, spread=3000.0 if not offset else 3.0, noise=0.02, ignored=0.0)
    if offset:  # an extra hidden unit of 1 with a weight of `offset` for every id
        one = torch.ones(8, 1, device=kit.device)
        column = torch.full((113, 1), offset, device=kit.device)
        case = case.with_(
            student_hidden=torch.cat((case.student_hidden.detach(), one), 1).requires_grad_(),
            student_weight=torch.cat((case.student_weight.detach(), column), 1).requires_grad_(),
        )
    expected, _ = kit.oracle(case)
    stats = stats_of(case, backend, fields=FIELDS)
    # a logit of 1e4 is known to 1e-3 in fp32
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name).double(), expected[name], rtol=5e-3, atol=2e-2)
    for name in DIFFERENTIABLE:
        actual = gradients(getattr(stats_of(case, backend, fields=(name,)), name).sum(), case)
        assert all(value.isfinite().all() for value in actual.values()), name


def test_large_maxima_cost_no_digits(backend, kit):
    """A log-sum-exp of 300 has an ulp of 3e-5; the small KL of two such rows must not."""
    case = kit.make_case(rows=16, noise=0.01, ignored=0.0, vocab=64)
    shift = torch.full((64,), 300.0, device=kit.device)
    shifted = case.with_(student_bias=shift.clone().requires_grad_(), teacher_bias=shift)
    logits = case.student_hidden @ case.student_weight.t() + 300
    teacher = case.teacher_hidden @ case.teacher_weight.t() + 300
    eye = torch.eye(64, device=kit.device)
    exact = shifted.with_(  # fp32 logits as given, so that the error is that of the statistics alone
        student_hidden=logits.detach().requires_grad_(),
        student_weight=eye.clone().requires_grad_(),
        student_bias=None,
        teacher_hidden=teacher,
        teacher_weight=eye,
        teacher_bias=None,
    )
    expected, _ = kit.oracle(exact)
    stats = stats_of(exact, backend, fields=FIELDS)
    tolerance = 2e-4 if kit.device == "cpu" else 5e-4  # a GPU approximates exp
    for name in ("reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"):
        assert kit.relative_error(getattr(stats, name), expected[name]) < tolerance, name
        found = gradients(getattr(stats_of(exact, backend, fields=(name,)), name).sum(), exact)
        expected_of, leaves = kit.oracle(exact)
        wanted = torch.autograd.grad(expected_of[name].sum(), leaves["hidden"])[0]
        assert kit.relative_error(found["hidden"], wanted) < tolerance, name


@pytest.mark.parametrize("masked", ["both", "student", "teacher"])
@pytest.mark.parametrize("mask", [-300.0, -1e4, -1e9, torch.finfo(torch.float32).min / 2])
def test_a_finite_mask_over_the_first_ids(mask, masked, engine, kit):
    """More of them than any block or tile holds: what is measured from the first ones would have no digits left."""
    case = kit.make_case(rows=3, vocab=2300, bias=True, ignored=0.0)
    case.labels[:] = 2299
    if masked != "teacher":
        case.student_bias.data[:2200] += mask
    if masked != "student":
        case.teacher_bias[:2200] += mask
    names = {"both": ("reverse_kl", "forward_kl"), "student": ("reverse_kl",), "teacher": ("forward_kl",)}[masked]
    names = (*names, "student_logprob", "teacher_logprob", "student_entropy", "teacher_entropy")
    expected, leaves = kit.oracle(case)
    stats = stats_of(case, engine, fields=names)
    with torch.no_grad():
        scored = stats_of(case, engine, fields=names)
    for name in names:
        assert kit.relative_error(getattr(stats, name), expected[name]) < 1e-5, name
        assert kit.relative_error(getattr(scored, name), expected[name]) < 1e-5, name
    loss = linear_divergence(*case.arguments[:4], divergence=names[0], backend=engine)
    wanted = torch.autograd.grad(expected[names[0]].mean(), list(leaves.values()))
    assert_close(gradients(loss, case), dict(zip(leaves, wanted, strict=True)), 1e-4, kit)


def test_selected_probability_below_the_smallest_float(backend, kit):
    case = kit.make_case(rows=8, vocab=50, spread=1.0, ignored=0.0, bias=True)
    with torch.no_grad():
        case.student_bias[7] = -150.0
        case.teacher_bias[7] = -400.0
    case.labels[:] = 7
    expected, _ = kit.oracle(case)
    stats = stats_of(case, backend, fields=FIELDS)
    assert (stats.student_logprob < -104).all()
    for name in FIELDS:
        assert kit.relative_error(getattr(stats, name), expected[name]) < 1e-5, name
    weights = coefficients(case)
    actual = gradients(objective_of(case, backend, weights), case)
    assert_close(actual, expected_gradients(case, weights, kit)[1], GRADIENT, kit)


def test_equal_models_have_no_divergence_and_no_gradient(backend, kit):
    case = kit.make_case(rows=20, noise=0.0, teacher_hidden=16)
    case = case.with_(teacher_hidden=case.student_hidden.detach(), teacher_weight=case.student_weight.detach())
    for name in ("reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"):
        stats = stats_of(case, backend, fields=(name,))
        assert getattr(stats, name).abs().max() < 1e-6, name
        for gradient in gradients(getattr(stats, name).sum(), case).values():
            assert gradient.abs().max() < 1e-6, name


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_ids_banned_in_both_heads_do_not_exist(softcap, backend, kit):
    options = {"student_options": {"softcap": softcap}, "teacher_options": {"softcap": softcap}}
    small = kit.make_case(rows=12, vocab=40, bias=True, **options)
    pad = torch.full((9,), -math.inf, device=kit.device)

    def padded(tensor, fill):
        return torch.cat((tensor.detach(), fill)).requires_grad_(tensor.requires_grad)

    rows = torch.randn(9, 16, device=kit.device)
    large = small.with_(
        student_weight=padded(small.student_weight, rows),
        student_bias=padded(small.student_bias, pad),
        teacher_weight=padded(small.teacher_weight, torch.randn(9, 24, device=kit.device)),
        teacher_bias=padded(small.teacher_bias, pad),
    )
    wanted, found = stats_of(small, backend, fields=FIELDS), stats_of(large, backend, fields=FIELDS)
    weights = coefficients(small)
    actual, expected = (gradients(objective_of(case, backend, weights), case) for case in (large, small))
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=1e-6)
    for name in ("weight", "bias"):
        assert (actual[name][40:] == 0).all(), name
    assert kit.relative_error(actual["hidden"], expected["hidden"]) < GRADIENT
    for name in ("weight", "bias"):
        assert kit.relative_error(actual[name][:40], expected[name]) < GRADIENT, name


def test_an_id_banned_in_the_student_alone(backend, kit):
    """q = 0 there: nothing for the reverse KL and the entropy; the forward KL is infinite; mixtures stay finite."""
    case = kit.make_case(rows=6, vocab=40, bias=True)
    with torch.no_grad():
        case.student_bias[3] = -math.inf
    kept, expected = case.kept, kit.oracle(case)[0]
    stats = stats_of(case, backend, fields=FIELDS)
    assert (stats.forward_kl[kept] == math.inf).all()
    finite = [name for name in FIELDS if name != "forward_kl" and "logprob" not in name]
    for name in finite:
        assert kit.relative_error(getattr(stats, name)[kept], expected[name]) < 2e-6, name
    weights = {name: weight for name, weight in coefficients(case).items() if name in finite}
    weights.pop("interpolated_cross_entropy")  # its target is no constant to a finite difference: test_interpolated.py
    actual = gradients(objective_of(case, backend, weights), case)
    assert (actual["weight"][3] == 0).all() and actual["bias"][3] == 0
    moved = _finite_difference(case, weights, kit)
    assert kit.relative_error(actual["hidden"], moved) < 1e-4
    gradient = gradients(objective_of(case, backend, {"forward_kl": weights["reverse_kl"]}), case)
    assert not any(value.isnan().any() for value in gradient.values())


def _finite_difference(case, weights, kit):
    """d sum(weight * statistic) / d hidden in float64."""

    def value(hidden):
        found = kit.oracle(case.with_(student_hidden=hidden))[0]
        return sum((weight[case.kept].double() * found[name].detach()).sum() for name, weight in weights.items())

    return central_differences(value, case.student_hidden)


def test_the_entropy_alone_of_a_student_with_a_banned_id(backend, kit):
    """Nothing else is asked that would look for -inf: q log q is 0 there, not NaN, in the gradient too."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 4, generator=generator).to(kit.device).requires_grad_()
    weight, bias = torch.randn(7, 4, generator=generator).to(kit.device), torch.zeros(7, device=kit.device)
    bias[2] = -math.inf
    fields = ("student_entropy",)
    found = linear_token_stats(hidden, LMHead(weight, bias), None, None, None, fields=fields, backend=backend)
    exact = hidden.detach().double().requires_grad_()
    log_q = (exact @ weight.double().T)[:, [0, 1, 3, 4, 5, 6]].log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    torch.testing.assert_close(found.student_entropy.double(), entropy, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(found.student_entropy.sum(), hidden)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(entropy.sum(), exact)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [0.0, -500.0])
def test_an_id_banned_in_the_teacher_alone(bias, backend, kit):
    """The reverse KL is truly infinite, even where q underflows to 0; everything else is finite and right."""
    case = kit.make_case(rows=12, vocab=40, bias=True)
    with torch.no_grad():
        case.teacher_bias[3] = -math.inf
        case.student_bias[3] = bias
    kept, expected = case.kept, kit.oracle(case)[0]
    stats = stats_of(case, backend, fields=FIELDS)
    assert (stats.reverse_kl[kept] == math.inf).all()
    finite = [name for name in FIELDS if name not in ("reverse_kl", "student_logprob", "teacher_logprob")]
    for name in finite:
        assert kit.relative_error(getattr(stats, name)[kept], expected[name]) < 2e-6, name
    weights = {name: weight for name, weight in coefficients(case).items() if name in finite}
    assert all(v.isfinite().all() for v in gradients(objective_of(case, backend, weights), case).values())


def test_a_zero_coefficient_silences_an_infinite_row(backend, kit):
    case = kit.make_case(rows=6, vocab=40, bias=True, ignored=0.0)
    with torch.no_grad():
        case.teacher_bias[3] = -math.inf
    fields = ("reverse_kl", "student_entropy")

    def objective(stats):
        finite = torch.where(stats.reverse_kl.isfinite(), stats.reverse_kl, 0.0)
        return finite + stats.student_entropy

    loss, _ = linear_objective(*case.arguments, objective, fields=fields, backend=backend)
    weights = {"student_entropy": torch.ones(6, device=kit.device)}
    assert_close(gradients(loss, case), expected_gradients(case, weights, kit)[1], GRADIENT, kit)


def test_a_banned_label(backend, kit):
    case = kit.make_case(rows=6, vocab=40, bias=True, ignored=0.0)
    with torch.no_grad():
        case.student_bias[3] = -math.inf
    case.labels[2] = 3
    logprob = linear_logprobs(*case.arguments[:2], case.labels, backend=backend)
    assert logprob[2] == -math.inf and logprob[torch.arange(6) != 2].isfinite().all()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_nan_in_a_kept_row_is_seen_there_and_nowhere_else(poison, backend, kit):
    case = kit.make_case(rows=9, ignored=0.0)
    with torch.no_grad():
        case.student_hidden[4, 0] = poison
    stats = stats_of(case, backend, fields=FIELDS)
    others = torch.arange(9, device=kit.device) != 4
    for name in FIELDS:
        value = getattr(stats, name)
        assert value[others].isfinite().all(), name
        assert value[4].isfinite() if name.startswith("teacher") else value[4].isnan(), name
    with torch.no_grad():
        case.student_hidden[4, 0] = 0.0
    case.teacher_hidden[2, 1] = poison
    stats = stats_of(case, backend, fields=FIELDS)
    for name in FIELDS:
        assert getattr(stats, name)[2].isfinite() == name.startswith("student"), name


def test_ignored_rows_are_never_read(backend, kit):
    """Their hidden states may be NaN and their labels anything: they reach no GEMM and no gather."""
    clean = kit.make_case(rows=30, ignored=0.5)
    dropped = ~clean.kept
    hidden = clean.student_hidden.detach().clone()
    hidden[dropped] = math.nan
    teacher_hidden = clean.teacher_hidden.clone()
    teacher_hidden[dropped] = math.inf
    labels = torch.where(dropped, 10**9, clean.labels)
    dirty = clean.with_(student_hidden=hidden.requires_grad_(), teacher_hidden=teacher_hidden, labels=labels)
    weights = coefficients(clean)
    loss = objective_of(dirty, backend, weights, ignore_index=10**9)
    assert torch.equal(loss, objective_of(clean, backend, weights))
    actual = gradients(loss, dirty)
    assert (actual["hidden"][dropped] == 0).all()
    assert_close(actual, expected_gradients(clean, weights, kit)[1], GRADIENT, kit)
    stats = stats_of(dirty, backend, ignore_index=10**9)
    assert (stats.reverse_kl[dropped] == 0).all() and (stats.student_argmax[dropped] == -1).all()


def test_every_label_at_the_edges_of_the_vocabulary(backend, kit):
    case = kit.make_case(rows=2, ignored=0.0)
    case.labels.copy_(torch.tensor([0, 112]))
    expected, _ = kit.oracle(case)
    assert kit.relative_error(stats_of(case, backend).student_logprob, expected["student_logprob"]) < STATS


def test_argmax_takes_the_lowest_of_equals(backend, kit):
    weight = torch.zeros(300, 4, device=kit.device)
    weight[[77, 130, 299]] = 1.0
    hidden = torch.ones(2, 4, device=kit.device)
    stats = linear_token_stats(hidden, weight, None, None, None, fields=("student_argmax",), backend=backend)
    assert stats.student_argmax.tolist() == [77, 77]


def test_the_teacher_is_detached_silently(backend, kit):
    case = kit.make_case(bias=True)
    for tensor in (case.teacher_hidden, case.teacher_weight, case.teacher_bias):
        tensor.requires_grad_()
    (objective_of(case, backend, coefficients(case)) + stats_of(case, backend).forward_kl.sum()).backward()
    assert case.student_weight.grad is not None
    assert case.teacher_hidden.grad is case.teacher_weight.grad is case.teacher_bias.grad is None


def test_a_bare_tensor_is_a_head(backend, kit):
    case = kit.make_case()
    heads = linear_divergence(*case.arguments[:4], labels=case.labels, backend=backend)
    bare = linear_divergence(
        case.student_hidden,
        case.student_weight,
        case.teacher_hidden,
        case.teacher_weight,
        labels=case.labels,
        backend=backend,
    )
    assert torch.equal(heads, bare)
    assert isinstance(case.arguments[1], LMHead)
