"""The thin losses: each is the statistic it names, under every reduction."""

import math

import numpy
import pytest
import torch
import torch.nn.functional as F

from minillm.kernels.divergences import DIVERGENCES
from minillm.losses import LMHead, linear_cross_entropy, linear_divergence, linear_logprobs, linear_token_stats


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_and_their_reductions(divergence, backend, kit):
    case = kit.make_case(rows=(2, 8), temperature=1.4)
    options = {"divergence": divergence, "labels": case.labels, "backend": backend, **case.options}
    expected, leaves = kit.oracle(case)
    kept = case.kept

    def run(**changes):
        return linear_divergence(*case.arguments[:4], **{**options, **changes})

    none = run(reduction="none")
    assert none.shape == (2, 8) and (none.flatten()[~kept] == 0).all()
    assert kit.relative_error(none.flatten()[kept], expected[divergence]) < 2e-6
    torch.testing.assert_close(run(reduction="sum").double(), expected[divergence].sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run().double(), expected[divergence].mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run(num_items=40).double(), expected[divergence].sum() / 40, rtol=1e-5, atol=1e-6)
    everywhere = run(labels=None, reduction="none")
    assert everywhere.ne(0).all()
    torch.testing.assert_close(everywhere.flatten()[kept], none.flatten()[kept])
    exact = torch.autograd.grad(expected[divergence].mean(), list(leaves.values()))
    for loss in (run(), run(reduction="none").sum() / kept.sum()):
        actual = torch.autograd.grad(loss, list(case.leaves.values()))
        for found, wanted in zip(actual, exact, strict=True):
            assert kit.relative_error(found, wanted) < 1e-5


def test_cross_entropy_is_torchs(backend, kit):
    case = kit.make_case(rows=(2, 9), bias=True)
    hidden, head, labels = case.arguments[0], case.arguments[1], case.labels
    logits = F.linear(hidden, head.weight, head.bias)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)
        actual = linear_cross_entropy(hidden, head, labels, reduction=reduction, backend=backend)
        torch.testing.assert_close(actual.flatten(), expected.view(actual.shape).flatten(), rtol=1e-5, atol=1e-5)
    loss = linear_cross_entropy(hidden, head, labels, num_items=7, backend=backend)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 7
    leaves = list(case.leaves.values())
    for found, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert kit.relative_error(found, wanted) < 1e-5


def test_logprobs(backend, kit):
    case = kit.make_case(rows=(2, 9), temperature=0.7)
    hidden, head, labels = case.arguments[0], case.arguments[1], case.labels
    found = linear_logprobs(hidden, head, labels, temperature=0.7, backend=backend)
    expected, leaves = kit.oracle(case)
    assert found.shape == labels.shape and (found[labels == -100] == 0).all()
    assert kit.relative_error(found.flatten()[case.kept], expected["student_logprob"]) < 1e-6
    weights = torch.linspace(-1, 1, 18, device=kit.device)
    actual = torch.autograd.grad((found.flatten() * weights).sum(), list(case.leaves.values()))
    loss = (expected["student_logprob"] * weights[case.kept].double()).sum()
    for gradient, wanted in zip(actual, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert kit.relative_error(gradient, wanted) < 1e-5


def test_other_ignore_index_and_a_known_count(kit):
    case = kit.make_case()
    labels = torch.where(case.labels == -100, 0, case.labels.clamp(min=1))
    kept = int((labels != 0).sum())
    plain = linear_cross_entropy(*case.arguments[:2], labels, ignore_index=0)
    known = linear_cross_entropy(*case.arguments[:2], labels, ignore_index=0, kept=kept)
    expected = F.cross_entropy(case.student_hidden @ case.student_weight.t(), labels, ignore_index=0)
    assert torch.equal(plain, known)
    torch.testing.assert_close(plain, expected)


def test_float64_stays_float64(kit):
    case = kit.make_case().doubled()
    stats = linear_token_stats(*case.arguments, **case.options)
    expected, _ = kit.oracle(case)
    assert stats.reverse_kl.dtype == torch.float64
    assert kit.relative_error(stats.reverse_kl[case.kept], expected["reverse_kl"]) < 1e-13


def test_a_teacher_in_another_precision(kit):
    """A bf16 teacher beside an fp32 student is common; its logits are fp32 all the same."""
    case = kit.make_case()
    half = case.with_(teacher_hidden=case.teacher_hidden.bfloat16(), teacher_weight=case.teacher_weight.bfloat16())
    found = linear_divergence(*half.arguments[:4], labels=case.labels, divergence="forward_kl")
    expected, _ = kit.oracle(half)
    assert found.item() == pytest.approx(expected["forward_kl"].mean().item(), rel=1e-6)
    head = LMHead(case.student_weight.detach().double())
    wide = linear_divergence(case.student_hidden.double(), head, *case.arguments[2:4], labels=case.labels)
    assert wide.dtype == torch.float64


NO_DIVISORS = (0, -1, math.nan, math.inf, "3", True, numpy.bool_(True), numpy.array(3), 3j)
NO_TENSORS = (0, [0.0], -1.0, math.nan, math.inf, True, 3j, [3, 4], [])


@pytest.mark.parametrize("num_items", [*NO_DIVISORS, *map(torch.tensor, NO_TENSORS)], ids=repr)
def test_a_divisor_is_one_positive_number(num_items, kit):
    case = kit.make_case(rows=4)
    with pytest.raises(ValueError, match="num_items must be"):
        linear_divergence(*case.arguments[:4], num_items=num_items)


@pytest.mark.parametrize("num_items", [7, 7.0, numpy.int64(7), numpy.uint8(7), numpy.float32(7), torch.tensor([7])])
def test_divisors_of_any_kind_of_number(num_items, kit):
    case = kit.make_case(rows=4)
    found = linear_divergence(*case.arguments[:4], num_items=num_items)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found, linear_divergence(*case.arguments[:4], reduction="sum") / 7)


def test_known_coefficients_take_one_launch(kit, monkeypatch):
    """Mean and sum of one statistic; an objective of the caller's, or no reduction, takes two kernels."""
    rows_triton = pytest.importorskip("minillm.kernels.rows_triton", reason="triton is not installed")
    launched = []

    def spy(name):
        kernel = getattr(rows_triton, name)

        class Spy:
            def __getitem__(self, grid):
                launched.append(name)
                return kernel[grid]

        monkeypatch.setattr(rows_triton, name, Spy())

    for name in ("statistics_kernel", "gradient_kernel", "both_kernel"):
        spy(name)
    case = kit.make_case(rows=5)
    pair = dict(labels=case.labels, backend="triton")
    for call, expected in (
        (lambda: linear_divergence(*case.arguments[:4], **pair), ["both_kernel"]),
        (lambda: linear_divergence(*case.arguments[:4], reduction="sum", **pair), ["both_kernel"]),
        (lambda: linear_cross_entropy(*case.arguments[:2], **pair), ["both_kernel"]),
        (
            lambda: linear_divergence(*case.arguments[:4], reduction="none", **pair).sum(),
            ["statistics_kernel", "gradient_kernel"],
        ),
    ):
        launched.clear()
        call().backward()
        assert launched == expected
        launched.clear()
        with torch.no_grad():
            call()
        assert launched == ["statistics_kernel"]
