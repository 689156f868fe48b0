"""linear_objective: inputs, metrics and the number of GEMMs."""

import pytest
import torch

from minillm.losses import linear_cross_entropy, linear_divergence, linear_objective, linear_token_stats
from tests.kernels.gemms import CountGemms

FIELDS = ("student_logprob", "reverse_kl")


def policy(stats, advantage, old):
    ratio = (stats.student_logprob - old).exp()
    clipped = ratio.clamp(0.8, 1.2)
    loss = torch.maximum(-advantage * ratio, -advantage * clipped) + stats.reverse_kl
    return loss, {"ratio": ratio, "clipped": (ratio != clipped)}


def policy_inputs(case):
    with torch.no_grad():
        old = linear_token_stats(*case.arguments, fields=("student_logprob",)).student_logprob
    generator = torch.Generator().manual_seed(1)
    noise, advantage = torch.randn(2, *case.labels.shape, generator=generator).to(old.device)
    return {"advantage": advantage, "old": old + 0.3 * noise}


def test_minillms_loss_matches_float64(backend, kit):
    """The clipped policy gradient with the exact single-step reverse KL: MiniLLM's loss in one pass."""
    case = kit.make_case(rows=(3, 7))
    inputs = policy_inputs(case)
    loss, metrics = linear_objective(
        *case.arguments, policy, inputs=inputs, fields=FIELDS, backend=backend, chunk_bytes=5000
    )
    expected, leaves = kit.oracle(case)

    class Stats:
        student_logprob, reverse_kl = expected["student_logprob"], expected["reverse_kl"]

    kept = {name: value.flatten()[case.kept].double() for name, value in inputs.items()}
    loss64, metrics64 = policy(Stats, **kept)
    assert loss.item() == pytest.approx(loss64.sum().item(), rel=1e-6)
    assert set(metrics) == {"ratio", "clipped"}
    for name, value in metrics.items():
        assert value.shape == () and not value.requires_grad
        assert value.item() == pytest.approx(metrics64[name].double().sum().item(), rel=1e-5)
    assert 0 < metrics["clipped"] < case.kept.sum()
    exact = torch.autograd.grad(loss64.sum(), list(leaves.values()))
    for found, wanted in zip(torch.autograd.grad(loss, list(case.leaves.values())), exact, strict=True):
        assert kit.relative_error(found, wanted) < 1e-5


def test_inputs_of_any_dtype_are_cut_along(kit):
    case = kit.make_case(rows=(2, 6))
    rows = case.labels.numel()
    counted = torch.arange(rows, device=kit.device)
    inputs = {"index": counted.view(2, 6), "even": counted % 2 == 0}
    seen = []

    def objective(stats, index, even):
        seen.append((index, even, stats.student_argmax))
        return torch.where(even, stats.reverse_kl, 0.0) * index

    loss, metrics = linear_objective(*case.arguments, objective, inputs=inputs, chunk_bytes=2 * 4 * 113 * 2)
    assert metrics == {} and len(seen) > 2
    index = torch.cat([chunk[0] for chunk in seen])
    assert torch.equal(index, case.kept.nonzero()[:, 0])
    assert torch.equal(torch.cat([chunk[1] for chunk in seen]), index % 2 == 0)
    stats = linear_token_stats(*case.arguments)
    assert torch.equal(torch.cat([chunk[2] for chunk in seen]), stats.student_argmax.flatten()[index])
    expected = (stats.reverse_kl.flatten() * counted * (counted % 2 == 0)).sum()
    torch.testing.assert_close(loss, expected)


def test_without_a_teacher_and_without_labels(kit):
    case = kit.make_case(ignored=0.0)
    hidden, head, labels = case.arguments[0], case.arguments[1], case.labels
    fields = []

    def objective(stats):
        fields.append(stats.fields)
        return -stats.student_logprob

    loss, _ = linear_objective(hidden, head, None, None, labels, objective)
    assert fields[0] == ("student_logprob", "student_entropy", "student_argmax")
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(hidden @ head.weight.t(), labels, reduction="sum")
    )
    entropy, _ = linear_objective(hidden, head, None, None, None, lambda stats: stats.student_entropy)
    expected = torch.distributions.Categorical(logits=hidden @ head.weight.t()).entropy().sum()
    torch.testing.assert_close(entropy, expected)
    entropy.backward()
    assert case.student_hidden.grad.abs().sum() > 0


def test_a_constant_objective_is_connected(kit):
    case = kit.make_case()
    loss, _ = linear_objective(*case.arguments, lambda stats: torch.ones_like(stats.reverse_kl))
    loss.backward()
    assert loss.item() == case.kept.sum() and (case.student_weight.grad == 0).all()


def test_metrics_keep_their_names_without_rows(kit):
    case = kit.make_case(ignored=1.0)
    _, metrics = linear_objective(*case.arguments, policy, inputs=policy_inputs(case), fields=FIELDS)
    assert {name: value.item() for name, value in metrics.items()} == {"ratio": 0.0, "clipped": 0.0}


@pytest.mark.parametrize(
    ("frozen", "student", "teacher"),
    [((), 3, 1), (("weight",), 2, 1), (("hidden",), 2, 1), (("hidden", "weight"), 1, 1)],
)
def test_three_student_gemms_and_one_teacher_gemm(frozen, student, teacher, kit):
    """And none for what is frozen; rows that are ignored count for nothing."""
    case = kit.make_case(rows=40, hidden=16, teacher_hidden=24, ignored=0.5)
    for name in frozen:
        case.leaves[name].requires_grad_(False)
    with CountGemms() as count:
        loss, _ = linear_objective(*case.arguments, lambda stats: stats.reverse_kl, fields=("reverse_kl",))
        if loss.requires_grad:
            loss.backward()
    rows = int(case.kept.sum())
    assert count.total == rows * 113 * (16 * student + 24 * teacher)
    assert loss.requires_grad == (len(frozen) < 2)
    for name, leaf in case.leaves.items():
        assert (leaf.grad is None) == (name in frozen)


def test_no_gemm_for_gradients_under_no_grad(kit):
    case = kit.make_case(rows=40, ignored=0.0)
    with CountGemms() as count, torch.no_grad():
        loss, _ = linear_objective(*case.arguments, lambda stats: stats.reverse_kl)
        linear_token_stats(*case.arguments)
    assert count.total == 2 * 40 * 113 * (16 + 24) and not loss.requires_grad


def test_token_stats_recompute(kit):
    case = kit.make_case(rows=40, ignored=0.0)
    with CountGemms() as count:
        linear_token_stats(*case.arguments).reverse_kl.sum().backward()
    assert count.total == 40 * 113 * (16 * 4 + 24 * 2)


def test_cross_entropy_rides_along(kit):
    case = kit.make_case(rows=20)
    mixed, _ = linear_objective(*case.arguments, lambda stats: 0.3 * stats.forward_kl - 0.7 * stats.student_logprob)
    parts = 0.3 * linear_divergence(
        *case.arguments[:4], labels=case.labels, divergence="forward_kl", reduction="sum"
    ) + 0.7 * linear_cross_entropy(*case.arguments[:2], case.labels, reduction="sum")
    torch.testing.assert_close(mixed, parts)
    for left, right in zip(*(torch.autograd.grad(x, list(case.leaves.values())) for x in (mixed, parts)), strict=True):
        assert kit.relative_error(left, right) < 1e-5
