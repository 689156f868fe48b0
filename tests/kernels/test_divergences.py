"""The table itself: every u against finite differences of its own definition, written out in plain Python floats."""

import math

import pytest
import torch

from minillm.kernels.divergences import DIVERGENCES, FIELDS, Rows, RowSpec, expectation, log_mixture

SPEC = RowSpec(tuple(FIELDS), beta=0.3, alpha=0.2, interpolation=0.6)


def interpolated(p, q):
    """softmax((1 - t) z_s + t z_t), which no constant of either row of logits changes."""
    weights = [b ** (1 - SPEC.interpolation) * a**SPEC.interpolation for a, b in zip(p, q, strict=True)]
    return [weight / sum(weights) for weight in weights]


def definition(name, p, q, target):
    """sum_j l(p_j, q_j), with q not necessarily normalised; the target is a constant."""
    total = 0.0
    for a, b, c in zip(p, q, target, strict=True):
        if name == "forward_kl":
            total += a * math.log(a / b)
        elif name == "reverse_kl":
            total += b * math.log(b / a)
        elif name == "student_entropy":
            total -= b * math.log(b)
        elif name == "jsd":
            m = SPEC.beta * a + (1 - SPEC.beta) * b
            total += SPEC.beta * a * math.log(a / m) + (1 - SPEC.beta) * b * math.log(b / m)
        elif name == "skew_forward_kl":
            total += a * math.log(a / (SPEC.alpha * a + (1 - SPEC.alpha) * b))
        elif name == "skew_reverse_kl":
            total += b * math.log(b / ((1 - SPEC.alpha) * a + SPEC.alpha * b))
        elif name == "interpolated_cross_entropy":
            total -= c * math.log(b)
        elif name == "tvd":
            total += 0.5 * abs(a - b)
    return total


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(3)
    log_q, log_p = torch.randn(2, 4, 7, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    target = [interpolated(*row) for row in zip(p.tolist(), q.tolist(), strict=True)]
    target = torch.tensor(target, dtype=torch.float64)
    return Rows(q=q, log_q=log_q, p=p, log_p=log_p, r=log_q - log_p, target=target)


@pytest.mark.parametrize("name", [*DIVERGENCES, "student_entropy"])
def test_value_and_derivative(name, rows):
    values = FIELDS[name].value(rows, SPEC)
    # where the table has no u of its own, the module says what it is
    u = {
        "reverse_kl": rows.r,
        "student_entropy": -rows.log_q,
        "forward_kl": -rows.p / rows.q,
        "interpolated_cross_entropy": -rows.target / rows.q,
    }.get(name)
    u = FIELDS[name].u(rows, SPEC) if u is None else u
    for row in range(4):
        p, q = rows.p[row].tolist(), rows.q[row].tolist()
        target = interpolated(p, q)
        assert values[row].item() == pytest.approx(definition(name, p, q, target), rel=1e-12)
        numeric = []
        for j in range(7):
            step = 1e-6 * q[j]
            up, down = ([*q[:j], q[j] + sign * step, *q[j + 1 :]] for sign in (1, -1))
            numeric.append((definition(name, p, up, target) - definition(name, p, down, target)) / (2 * step))
        shift = [a - b for a, b in zip(numeric, u[row].tolist(), strict=True)]
        # u is meant up to a constant, which the softmax projects out
        assert max(shift) - min(shift) < 1e-7


@pytest.mark.parametrize("weight", [1e-3, 0.3, 0.5, 0.9])
def test_mixture_is_stable_for_any_ratio(weight):
    r = torch.tensor([-1e30, -500.0, -20.0, -1e-6, 0.0, 1e-6, 20.0, 500.0, 1e30])
    over_p, over_q = log_mixture(r, weight)
    for ratio, found_p, found_q in zip(r.double().tolist(), over_p.tolist(), over_q.tolist(), strict=True):
        # log(weight + (1 - weight) e^r) with the larger term taken out
        larger = max(math.log(weight), math.log1p(-weight) + ratio)
        smaller = min(math.log(weight), math.log1p(-weight) + ratio)
        exact = larger + math.log1p(math.exp(smaller - larger))
        assert found_p == pytest.approx(exact, rel=1e-6, abs=1e-7)
        if abs(ratio) < 1e29:
            assert found_q == pytest.approx(exact - ratio, rel=1e-6, abs=1e-7)


def test_mixture_keeps_float64():
    r = torch.tensor([0.7, -0.7], dtype=torch.float64)
    over_p, _ = log_mixture(r, 0.3)
    assert over_p[0].item() == pytest.approx(math.log(0.3 + 0.7 * math.exp(0.7)), rel=1e-15)


def test_the_table_is_whole():
    for name, field in FIELDS.items():
        assert name in DIVERGENCES or name.startswith(("student_", "teacher_"))
        assert not (field.differentiable and name.startswith("teacher_"))
        assert (field.u is None) or field.value is not None
    assert RowSpec(("jsd",)).needs("second_pass") and RowSpec(("jsd",)).needs("teacher")
    assert not RowSpec(("student_entropy",)).needs("teacher")
    assert RowSpec(("student_logprob",)).needs("labels")
    q, u = torch.rand(2, 3, 5, dtype=torch.float64)
    assert torch.allclose(expectation(q, u), (q * u).sum(-1))
