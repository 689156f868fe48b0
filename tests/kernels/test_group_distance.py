"""linear_group_distance against its definition, written out outcome by outcome in float64, and what must hold of it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.kernels.group_distance import Matches, Side, group_distance, linear_group_distance
from minillm.kernels.head import LMHead

# (rows of the student, rows of the teacher, whether both beginnings are the same text)
GROUPS = [
    ((0,), (0,), True),
    ((1, 2), (1,), False),
    ((3,), (2, 3, 4), False),
    ((4, 5), (5, 6), True),
    ((6,), (7,), True),
]
MATCHES = {0: 3, 2: 0, 5: 7, 6: 1}
V_S, V_T = 9, 12
# labels of matching ids where the beginnings are the same
STUDENT, TEACHER = [0, 4, 8, 1, 3, 5, 2], [3, 9, 2, 4, 11, 6, 7, 0]


def sides(*, seed=0, dtype=torch.float64, groups=GROUPS, softcap=None, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    made = []
    for name, ids, labels, grad in ((0, V_S, STUDENT, True), (1, V_T, TEACHER, False)):
        rows = [group[name] for group in groups]
        before = [(row, labels[row], number) for number, of_group in enumerate(rows) for row in of_group[:-1]]
        columns = torch.tensor(before, dtype=torch.int64).reshape(-1, 3).unbind(1)
        last = torch.tensor([of_group[-1] for of_group in rows], dtype=torch.int64)
        hidden, weight = random(len(labels), 5).requires_grad_(grad), random(ids, 5).requires_grad_(grad)
        bias = random(ids).requires_grad_(grad)
        made.append(Side(hidden, LMHead(weight, bias, scale, softcap), last, torch.tensor(labels)[last], *columns))
    same = torch.tensor([group[2] for group in groups], dtype=torch.bool)
    pairs = torch.tensor([*MATCHES.items()])
    return *made, Matches(pairs[:, 0], pairs[:, 1], same)


def log_probabilities(side):
    z = side.head.logit_scale * (side.hidden @ side.head.weight.T + side.head.bias)
    cap = side.head.softcap
    return torch.log_softmax(z if cap is None else cap * torch.tanh(z / cap), -1)


def kl(b, a):
    return sum(x * torch.log(x / y) for x, y in zip(b, a, strict=True))


def oracle(student, teacher, beta, weight, groups=GROUPS):
    """(loss, divergence, distance), summed over groups, outcome by outcome."""
    logq, logp = log_probabilities(student), log_probabilities(teacher).detach()
    total, apart, unmatched = 0.0, 0.0, 0.0
    for ours, theirs, same in groups:
        q0 = math.prod([logq[row, STUDENT[row]].exp() for row in ours[:-1]], start=torch.ones(()).double())
        p0 = math.prod([logp[row, TEACHER[row]].exp() for row in theirs[:-1]], start=torch.ones(()).double())
        a, b = q0 * logq[ours[-1]].exp(), p0 * logp[theirs[-1]].exp()
        pairs = MATCHES if same else {STUDENT[ours[-1]]: TEACHER[theirs[-1]]}
        a_m, b_m = [a[v] for v in pairs], [b[u] for u in pairs.values()]
        a_m, b_m = [*a_m, 1 - sum(a_m)], [*b_m, 1 - sum(b_m)]
        m = [beta * y + (1 - beta) * x for x, y in zip(a_m, b_m, strict=True)]
        divergence = (
            kl(b_m, a_m) if beta == 0 else kl(a_m, b_m) if beta == 1 else beta * kl(b_m, m) + (1 - beta) * kl(a_m, m)
        )
        rest_a = [*(a[v] for v in range(V_S) if v not in pairs), 1 - q0]
        rest_b = [*(b[u] for u in range(V_T) if u not in pairs.values()), 1 - p0]
        size = max(len(rest_a), len(rest_b))
        rest_a, rest_b = (
            torch.stack([*rest, *[torch.zeros(()).double()] * (size - len(rest))]).sort(descending=True).values
            for rest in (rest_a, rest_b)
        )
        distance = (rest_b - rest_a).abs().sum()
        apart, unmatched = apart + divergence, unmatched + distance
        total = total + weight * divergence + (1 - weight) * distance
    return total, apart, unmatched


def leaves(side):
    return [side.hidden, side.head.weight, side.head.bias]


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("chunk_bytes", [None, 1], ids=["one_chunk", "a_group_at_a_time"])
def test_value_and_gradient_are_those_of_every_outcome(beta, weight, chunk_bytes):
    student, teacher, matches = sides(scale=0.8, softcap=4.0)
    options = dict(beta=beta, matched_weight=weight, chunk_bytes=chunk_bytes)
    loss, parts = linear_group_distance(student, teacher, matches, **options)
    want, apart, unmatched = oracle(student, teacher, beta, weight)
    assert loss.item() == pytest.approx(want.item(), rel=1e-10)
    assert parts["matched_divergence_nats"].item() == pytest.approx(apart.item(), rel=1e-10)
    assert parts["unmatched_distance"].item() == pytest.approx(unmatched.item(), rel=1e-10)
    found, wanted = (torch.autograd.grad(2.0 * one, leaves(student)) for one in (loss, want))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-11)


def test_fp32_is_the_float64_value_to_rounding():
    student, teacher, matches = sides(dtype=torch.float32)
    wide, wide_teacher, _ = sides()
    loss, _ = linear_group_distance(student, teacher, matches, beta=0.5, matched_weight=0.4)
    want, *_ = oracle(wide, wide_teacher, 0.5, 0.4)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(want.item(), rel=1e-5)
    for ours, theirs in zip(
        *(torch.autograd.grad(*one) for one in ((loss, leaves(student)), (want, leaves(wide)))), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5)


@given(seed=st.integers(0, 200), sharp=st.floats(0.1, 40), beta=st.sampled_from([0.0, 0.5, 1.0]))
def test_it_is_never_negative_whatever_the_beginnings_are(seed, sharp, beta):
    """The released merge leaves rows that do not add up to 1, whose divergence can be."""
    generator = torch.Generator().manual_seed(seed)
    z, z_t = sharp * torch.randn(4, V_S, generator=generator), sharp * torch.randn(4, V_T, generator=generator)
    beginnings = -torch.rand(2, 4, generator=generator) * sharp
    labels = [torch.randint(size, (4,), generator=generator) for size in (V_S, V_T)]
    pairs = torch.tensor([*MATCHES.items()])
    matches = Matches(pairs[:, 0], pairs[:, 1], torch.tensor([True, False, True, False]))
    divergence, distance = group_distance(
        z, beginnings[0], labels[0], z_t, beginnings[1], labels[1], matches, beta=beta
    )
    assert (divergence > -1e-5).all() and divergence.isfinite().all()
    assert (distance >= 0).all() and (distance <= 2 + 1e-5).all()


def test_a_teacher_that_says_the_same_is_at_no_distance():
    student, _, _ = sides()
    same = Side(student.hidden.detach(), student.head, *student[2:])
    ids = torch.arange(V_S)
    loss, _ = linear_group_distance(
        student, same, Matches(ids, ids, torch.ones(len(GROUPS), dtype=torch.bool)), beta=0.5
    )
    assert abs(loss.item()) < 1e-12
    assert max(one.abs().max() for one in torch.autograd.grad(loss, leaves(student))) < 1e-9


def test_no_groups_at_all():
    student, teacher, matches = sides(groups=[])
    loss, parts = linear_group_distance(student, teacher, matches)
    gradients = torch.autograd.grad(loss, leaves(student))
    assert loss.item() == 0 == parts["unmatched_distance"].item() and max(one.abs().max() for one in gradients) == 0


def test_matching_ids_that_a_head_has_no_row_for_do_not_count():
    student, teacher, matches = sides()
    want, _ = linear_group_distance(student, teacher, matches)
    beyond = Matches(
        torch.cat([matches.student, torch.tensor([V_S, 7])]),
        torch.cat([matches.teacher, torch.tensor([5, V_T + 3])]),
        matches.same_beginning,
    )
    assert linear_group_distance(student, teacher, beyond)[0].item() == want.item()
