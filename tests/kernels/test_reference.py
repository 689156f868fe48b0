"""The reference against definitions: scipy-free, by hand on two ids, and torch's own losses where it has them."""

import math

import pytest
import torch
import torch.nn.functional as F

from minillm.kernels import reference


def test_two_ids_by_hand():
    q, p = (0.75, 0.25), (0.4, 0.6)
    student, teacher = torch.tensor([q, p], dtype=torch.float64).log().unsqueeze(1)
    found = reference.token_stats(student, teacher, torch.tensor([1]), beta=0.3, alpha=0.1, interpolation=0.25)

    def kl(a, b):
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))

    def mix(weight):
        return tuple(weight * x + (1 - weight) * y for x, y in zip(p, q, strict=True))

    geometric = [b**0.75 * a**0.25 for a, b in zip(p, q, strict=True)]
    geometric = [weight / sum(geometric) for weight in geometric]
    expected = {
        "student_logprob": math.log(0.25),
        "teacher_logprob": math.log(0.6),
        "reverse_kl": kl(q, p),
        "forward_kl": kl(p, q),
        "student_entropy": -sum(x * math.log(x) for x in q),
        "teacher_entropy": -sum(x * math.log(x) for x in p),
        "student_argmax": 0,
        "teacher_argmax": 1,
        "jsd": 0.3 * kl(p, mix(0.3)) + 0.7 * kl(q, mix(0.3)),
        "skew_forward_kl": kl(p, mix(0.1)),
        "skew_reverse_kl": kl(q, mix(0.9)),
        "tvd": 0.35,
        "interpolated_cross_entropy": -sum(a * math.log(b) for a, b in zip(geometric, q, strict=True)),
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, rel=1e-12), name


def test_against_torch():
    student, teacher = torch.randn(2, 5, 9, dtype=torch.float64)
    labels = torch.arange(5)
    found = reference.token_stats(student, teacher, labels)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found["forward_kl"], forward)
    torch.testing.assert_close(-found["student_logprob"], F.cross_entropy(student, labels, reduction="none"))
    torch.testing.assert_close(found["student_entropy"], torch.distributions.Categorical(logits=student).entropy())


def test_impossible_ids():
    student = torch.tensor([[0.0, 1.0, -math.inf, -math.inf]], dtype=torch.float64)
    teacher = torch.tensor([[0.5, 1.0, -math.inf, 0.0]], dtype=torch.float64)
    found = reference.token_stats(student, teacher, None)
    assert found["forward_kl"].item() == math.inf
    assert all(value.isfinite().all() for name, value in found.items() if name != "forward_kl")
    assert reference.token_stats(teacher, student, None)["reverse_kl"].item() == math.inf


def test_logits():
    hidden, weight, bias = torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0.0, 1.0, -math.inf, 2.0])
    z = reference.logits(hidden, weight, bias, logit_scale=0.5, softcap=3.0, temperature=2.0)
    raw = F.linear(hidden, weight, bias) * 0.5
    assert (z[:, 2] == -math.inf).all()
    torch.testing.assert_close(z[:, [0, 1, 3]], (3 * torch.tanh(raw / 3) / 2)[:, [0, 1, 3]])


def test_ids_that_do_not_exist_pass_no_gradient():
    student = torch.tensor([[0.3, -0.2, -math.inf, 0.9]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.1, 0.4, -math.inf, -0.5]], dtype=torch.float64)
    kept = [0, 1, 3]
    names = ("reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "student_entropy")
    for name in (*names, "interpolated_cross_entropy"):
        (found,) = torch.autograd.grad(reference.token_stats(student, teacher, None)[name].sum(), student)
        without = student.detach()[:, kept].requires_grad_()
        (expected,) = torch.autograd.grad(reference.token_stats(without, teacher[:, kept], None)[name].sum(), without)
        assert found[0, 2] == 0, name
        torch.testing.assert_close(found[:, kept], expected, msg=name)
