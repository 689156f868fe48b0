"""TokenStats and linear_token_stats: what is there, what is not, and gradients under any upstream gradient."""

import pytest
import torch

from minillm.losses import TokenStats, linear_token_stats

STUDENT = ("student_logprob", "student_entropy", "student_argmax")


def test_the_eight_by_default(kit):
    case = kit.make_case()
    stats = linear_token_stats(*case.arguments)
    assert len(stats.fields) == 8 and "jsd" not in stats.fields
    alone = linear_token_stats(*case.arguments[:2], None, None, case.labels)
    assert alone.fields == STUDENT
    assert torch.equal(alone.student_logprob, stats.student_logprob)
    unlabelled = linear_token_stats(*case.arguments[:4], None)
    assert len(unlabelled.fields) == 6 and unlabelled.reverse_kl.ne(0).all()


def test_reading_what_was_not_asked_for(kit):
    stats = linear_token_stats(*kit.make_case().arguments, fields=("reverse_kl",))
    with pytest.raises(AttributeError, match=r"forward_kl not computed; pass fields=\('reverse_kl', 'forward_kl'\)"):
        _ = stats.forward_kl
    with pytest.raises(AttributeError, match="teacher_logprob, student_logprob not computed"):
        _ = stats.reward
    with pytest.raises(AttributeError, match="no attribute 'kl'; its statistics are reverse_kl"):
        _ = stats.kl
    assert not hasattr(stats, "tvd") and hasattr(stats, "reverse_kl")
    assert repr(stats) == "TokenStats(reverse_kl: (13,))"
    assert TokenStats({"student_logprob": 1.0, "teacher_logprob": 3.0}).reward == 2.0


def test_only_float_statistics_of_the_student_have_a_gradient(kit):
    stats = linear_token_stats(*kit.make_case().arguments)
    for name in stats.fields:
        assert getattr(stats, name).requires_grad == (name in kit.differentiable), name
    assert stats.reward.requires_grad
    with torch.no_grad():
        assert not linear_token_stats(*kit.make_case().arguments).reverse_kl.requires_grad


@pytest.mark.parametrize("upstream", ["ones", "random", "one row", "zero"])
def test_any_upstream_gradient(upstream, kit):
    case = kit.make_case(rows=(3, 4), bias=True)
    kept = case.kept
    weights = {
        "ones": torch.ones(12),
        "random": torch.randn(12),
        "one row": torch.eye(12)[int(kept.nonzero()[0])],
        "zero": torch.zeros(12),
    }[upstream].to(kit.device)
    stats = linear_token_stats(*case.arguments, fields=("reverse_kl", "student_logprob"))
    actual = torch.autograd.grad(
        (stats.reverse_kl, stats.student_logprob),
        list(case.leaves.values()),
        (weights.view(3, 4), 2 * weights.view(3, 4)),
    )
    expected, leaves = kit.oracle(case)
    loss = (weights[kept].double() * (expected["reverse_kl"] + 2 * expected["student_logprob"])).sum()
    for found, exact in zip(actual, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        assert kit.relative_error(found, exact) < 1e-5


def test_one_statistic_may_go_without_a_gradient(kit):
    case = kit.make_case()
    stats = linear_token_stats(*case.arguments)
    stats.student_entropy.sum().backward()  # the others get none, so the teacher's logits are not recomputed
    expected, leaves = kit.oracle(case)
    expected["student_entropy"].sum().backward()
    assert kit.relative_error(case.student_weight.grad, leaves["weight"].grad) < 1e-5


def test_gradcheck(kit):
    """In float64, every field, against torch's own finite differences. A constant target is none to these."""
    names = [name for name in kit.differentiable if name != "interpolated_cross_entropy"]
    case = kit.make_case(rows=3, vocab=7, hidden=3, teacher_hidden=2, dtype=torch.float64, bias=True, ignored=0.0)
    case = case.with_(student_options={"softcap": 4.0, "logit_scale": 0.7}, temperature=1.3)
    case.labels[1] = -100
    from minillm.losses import LMHead

    def run(hidden, weight, bias):
        head = LMHead(weight, bias, **case.student_options)
        stats = linear_token_stats(hidden, head, *case.arguments[2:], fields=names, chunk_bytes=200, **case.options)
        return tuple(getattr(stats, name) for name in names)

    assert torch.autograd.gradcheck(run, tuple(case.leaves.values()))
