"""A TopK teacher on hostile input, over every backend that takes one: tails of nothing, infinite logits, NaN, no rows."""

import importlib
import math

import pytest
import torch

from minillm.kernels.divergences import RowSpec
from minillm.kernels.sparse_teacher import SparseRows
from minillm.losses import TopK, linear_divergence, linear_logprobs, linear_objective, linear_token_stats
from tests.kernels.contract import GRADIENT, STATS, assert_close, central_differences, gradients, objective_of, stats_of
from tests.kernels.top_k import DIVERGENCES, FIELDS, SparseCase, expected_gradients, oracle, sparse, weights_of

INTERPOLATED = "interpolated_cross_entropy"
MOVING = tuple(name for name in FIELDS if name != INTERPOLATED)  # the others' derivatives are differences of values


def with_logits(kit, student, top_k, labels=None):
    """These very logits, (N, V) fp32: hidden states times the identity."""
    rows, vocab = student.shape
    case = kit.make_case(rows=rows, vocab=vocab, hidden=vocab, ignored=0.0)
    case.labels.copy_(torch.zeros(rows) if labels is None else labels)
    student = student.to(kit.device).requires_grad_()
    eye = torch.eye(vocab, device=kit.device, requires_grad=True)
    return SparseCase(case.with_(student_hidden=student, student_weight=eye), top_k)


def random_logits(kit, rows=4, vocab=30, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)).mul_(2).to(kit.device)


def first_ids(kit, rows, probabilities, dtype=torch.float32):
    """The first k ids of every row with these probabilities."""
    logprobs = torch.tensor(probabilities, dtype=torch.float64).log().to(dtype).to(kit.device)
    ids = torch.arange(len(probabilities), device=kit.device)
    return TopK(ids.expand(rows, -1), logprobs.expand(rows, -1))


def assert_as_oracle(case, backend, kit, names=FIELDS, tolerance=GRADIENT):
    stats, (expected, leaves) = stats_of(case, backend, fields=names), oracle(case)
    for name in names:
        # a cross-entropy next to 0 is known to the last place of 1
        small = 2e-6 if name == INTERPOLATED else STATS
        assert kit.relative_error(getattr(stats, name), expected[name]) < small, name
        actual = torch.autograd.grad(getattr(stats, name).sum(), case.leaves["hidden"], retain_graph=True)[0]
        wanted = torch.autograd.grad(expected[name].sum(), leaves["hidden"], retain_graph=True)[0]
        assert kit.relative_error(actual, wanted) < tolerance, name


@pytest.mark.parametrize("down", [10.0, 40.0, 85.0, 200.0])
def test_a_tail_that_the_student_all_but_excludes(down, backend, kit):
    """q_tail down to exp(-200): log q_tail of a difference from 1 would be minus infinity at 17."""
    student = random_logits(kit)
    student[:, 3:] -= down
    assert_as_oracle(with_logits(kit, student, first_ids(kit, 4, (0.5, 0.3, 0.19))), backend, kit)


@pytest.mark.parametrize("down", [10.0, 20.0])
def test_ids_that_the_student_all_but_excludes(down, backend, kit):
    """q_tail is 1 to rounding, and the gradient that of what is left; further down float64 has no digits either."""
    student = random_logits(kit)
    student[:, :3] -= down
    assert_as_oracle(with_logits(kit, student, first_ids(kit, 4, (0.4, 0.2, 1e-6))), backend, kit)


@pytest.mark.parametrize("tail", [1e-3, 1e-5, 1e-6])
def test_a_small_tail_keeps_the_digits_that_the_logarithms_leave_it(tail, backend, kit):
    case = with_logits(kit, random_logits(kit), first_ids(kit, 4, (0.7, 0.3 - tail)))
    assert_as_oracle(case, backend, kit)
    exact = oracle(with_logits(kit, random_logits(kit), first_ids(kit, 4, (0.7, 0.3 - tail), torch.float64)))[0]
    found = stats_of(case, backend).reverse_kl
    assert kit.relative_error(found, exact["reverse_kl"]) < 1e-7 / tail


@pytest.mark.parametrize("probabilities", [(1.0,), (0.7, 0.3), (0.7, 0.3 - 1e-9), (0.7, 0.3 + 5e-8), (0.7, 0.3 + 5e-5)])
def test_a_tail_that_is_zero_to_rounding(probabilities, backend, kit):
    """It is as large as the rounding: finite everywhere, next to nothing where the weight is the teacher's."""
    case = with_logits(kit, random_logits(kit), first_ids(kit, 4, probabilities))
    assert_as_oracle(case, backend, kit)
    log_q = case.student_hidden.detach().double().log_softmax(1)
    p = torch.tensor(probabilities, dtype=torch.float64, device=kit.device)
    cross_entropy = -(p * log_q[:, : len(p)]).sum(1) + (p * p.log()).sum()
    difference = stats_of(case, backend).forward_kl - cross_entropy
    assert difference.abs().max() < 5e-6 + 20 * (p.sum() - 1).abs()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_tail_below_the_rounding_of_half_precision(dtype, backend, kit):
    """Probabilities that add up to 1.004 and to 0.998 once their logarithms are rounded, whatever the tail was."""
    for probabilities in ((0.5, 0.3, 0.1999), (0.36, 0.34, 0.29)):
        case = with_logits(kit, random_logits(kit), first_ids(kit, 4, probabilities, dtype))
        assert_as_oracle(case, backend, kit)
        exact = oracle(with_logits(kit, random_logits(kit), first_ids(kit, 4, probabilities, torch.float64)))[0]
        assert (stats_of(case, backend).reverse_kl - exact["reverse_kl"]).abs().max() < 5


def _finite_difference(case, weights):
    """d sum(weight * statistic) / d hidden in float64."""

    def value(hidden):
        found = oracle(SparseCase(case.case.with_(student_hidden=hidden), case.top_k))[0]
        return sum((weight.double() * found[name].detach()).sum() for name, weight in weights.items())

    return central_differences(value, case.student_hidden)


def banned(kit, ids, softcap=None, k=4, **options):
    """A case whose student bans `ids`, named by their place in the TopK of every row, or in the tail."""
    case = sparse(kit.make_case(rows=4, vocab=12, hidden=5, bias=True, ignored=0.0, **options), k)
    top_k = case.top_k
    top_k.ids.copy_(torch.arange(k, device=kit.device))  # the same ids in every row, with the row's probabilities
    with torch.no_grad():
        case.student_bias[list(ids)] = -math.inf
    case.labels.fill_(11)
    return case


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_an_id_banned_in_the_student_alone(softcap, backend, kit):
    """q = 0 there: nothing for the reverse KL and the entropy; the forward KL is infinite; mixtures stay finite."""
    case = banned(kit, [2], student_options={"softcap": softcap})
    stats, expected = stats_of(case, backend, fields=FIELDS), oracle(case)[0]
    assert (stats.forward_kl == math.inf).all()
    finite = [name for name in MOVING if name != "forward_kl"]
    for name in finite:
        assert kit.relative_error(getattr(stats, name), expected[name]) < 2e-6, name
    weights = weights_of(case, finite)
    actual = gradients(objective_of(case, backend, weights), case)
    assert (actual["weight"][2] == 0).all() and actual["bias"][2] == 0
    moved = _finite_difference(case, weights)
    assert kit.relative_error(actual["hidden"], moved) < 1e-4
    gradient = gradients(objective_of(case, backend, {"forward_kl": weights["reverse_kl"]}), case)
    assert not any(value.isnan().any() for value in gradient.values())


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_ids_of_the_tail_that_the_student_bans_do_not_exist(softcap, backend, kit):
    case = banned(kit, [5, 6], student_options={"softcap": softcap})
    stats, expected = stats_of(case, backend, fields=FIELDS), oracle(case)[0]
    for name in FIELDS:
        assert kit.relative_error(getattr(stats, name), expected[name]) < 2e-6, name
    weights = weights_of(case, MOVING)
    actual = gradients(objective_of(case, backend, weights), case)
    assert (actual["weight"][5:7] == 0).all() and (actual["bias"][5:7] == 0).all()
    assert kit.relative_error(actual["hidden"], _finite_difference(case, weights)) < 1e-4


@pytest.mark.parametrize("softcap", [None, 8.0])
def test_a_student_without_any_id_in_the_tail(softcap, backend, kit):
    """A tail of the teacher's that is zero to rounding is no outcome; one that is not makes the forward KL infinite."""
    case = banned(kit, range(4, 12), student_options={"softcap": softcap})
    case.labels.fill_(1)
    logprobs = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).to(kit.device).log_softmax(1)
    case.top_k = TopK(case.top_k.ids, logprobs)
    stats, expected = stats_of(case, backend, fields=FIELDS), oracle(case)[0]
    for name in FIELDS:
        assert kit.relative_error(getattr(stats, name), expected[name]) < 2e-6, name
    weights = weights_of(case, MOVING)
    actual = gradients(objective_of(case, backend, weights), case)
    assert (actual["weight"][4:] == 0).all() and (actual["bias"][4:] == 0).all()
    assert kit.relative_error(actual["hidden"], _finite_difference(case, weights)) < 1e-4
    case.top_k = TopK(case.top_k.ids, logprobs - 0.1)
    stats, expected = stats_of(case, backend, fields=FIELDS), oracle(case)[0]
    assert (stats.forward_kl == math.inf).all()
    for name in FIELDS:
        if name != "forward_kl":
            assert kit.relative_error(getattr(stats, name), expected[name]) < 2e-6, name


def test_an_id_that_the_teacher_excludes(backend, kit):
    """log p = -inf: the reverse KL is truly infinite, unless the student excludes the id too."""
    case = banned(kit, [])
    logprobs = case.top_k.logprobs.clone()
    logprobs[:, 2] = -math.inf
    case.top_k = TopK(case.top_k.ids, logprobs)
    stats, expected = stats_of(case, backend, fields=FIELDS), oracle(case)[0]
    assert (stats.reverse_kl == math.inf).all()
    for name in FIELDS:
        if name != "reverse_kl":
            assert kit.relative_error(getattr(stats, name), expected[name]) < 2e-6, name
    with torch.no_grad():
        case.student_bias[2] = -math.inf
    stats, expected = stats_of(case, backend, fields=FIELDS), oracle(case)[0]
    for name in FIELDS:
        assert kit.relative_error(getattr(stats, name), expected[name]) < 2e-6, name
    weights = weights_of(case, MOVING)
    actual = gradients(objective_of(case, backend, weights), case)
    assert actual["bias"][2] == 0
    assert kit.relative_error(actual["hidden"], _finite_difference(case, weights)) < 1e-4


def test_a_zero_coefficient_silences_an_infinite_row(backend, kit):
    case = banned(kit, [2])

    def objective(stats):
        return torch.where(stats.forward_kl.isfinite(), stats.forward_kl, 0.0) + stats.student_entropy

    loss, _ = linear_objective(*case.arguments, objective, fields=("forward_kl", "student_entropy"), backend=backend)
    weights = {"student_entropy": torch.ones(4, device=kit.device)}
    assert kit.relative_error(gradients(loss, case)["hidden"], _finite_difference(case, weights)) < 1e-4


@pytest.mark.parametrize("place", [2, 7])
def test_a_banned_label(place, backend, kit):
    """Among the ids, or in the tail."""
    case = banned(kit, [place])
    case.labels[2] = place
    stats = stats_of(case, backend, fields=("student_logprob", "reverse_kl"))
    dense = linear_logprobs(*case.arguments[:2], case.labels, backend=backend)
    torch.testing.assert_close(stats.student_logprob, dense)
    assert stats.student_logprob[2] == -math.inf
    found = gradients(stats.student_logprob[:2].sum() + stats.student_logprob[3], case)
    assert_close(found, gradients(dense[:2].sum() + dense[3], case), GRADIENT, kit)


def test_no_id_at_all_is_nan(backend, kit):
    case = banned(kit, range(12))
    stats = stats_of(case, backend, fields=FIELDS)
    assert all(getattr(stats, name).isnan().all() for name in FIELDS)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_nan_in_a_kept_row_is_seen_there_and_nowhere_else(poison, backend, kit):
    case = sparse(kit.make_case(rows=9, ignored=0.0), 5)
    others = torch.arange(9, device=kit.device) != 4
    with torch.no_grad():
        case.student_hidden[4, 0] = poison
    stats = stats_of(case, backend, fields=FIELDS)
    for name in FIELDS:
        assert getattr(stats, name)[others].isfinite().all() and getattr(stats, name)[4].isnan(), name
    with torch.no_grad():
        case.student_hidden[4, 0] = 0.0
    case.top_k.logprobs[4, 1] = math.nan
    stats = stats_of(case, backend, fields=FIELDS)
    for name in FIELDS:
        assert getattr(stats, name)[others].isfinite().all(), name
        assert getattr(stats, name)[4].isfinite() == name.startswith("student"), name


@pytest.mark.parametrize("place", [1, 25])
def test_a_nan_in_one_logit_alone(place, backend, kit):
    """Of an id, or of the only id that the student leaves in the tail."""
    student = random_logits(kit)
    student[1, 3:] = -math.inf
    student[1, place] = math.nan
    stats = stats_of(with_logits(kit, student, first_ids(kit, 4, (0.5, 0.3, 0.1))), backend, fields=FIELDS)
    for name in FIELDS:
        assert getattr(stats, name).isnan().tolist() == [False, True, False, False], name


def test_ignored_rows_are_never_read(backend, kit):
    """Their ids may be anything, and twice the same, their log-probabilities NaN."""
    clean = sparse(kit.make_case(rows=30, ignored=0.5), 4)
    dropped = ~clean.kept
    ids, logprobs = clean.top_k.ids.clone(), clean.top_k.logprobs.clone()
    ids[dropped] = torch.tensor([-1, 10**9, 7, 7], device=kit.device)
    logprobs[dropped] = torch.tensor([math.nan, math.inf, 3.0, 0.0], device=kit.device)
    dirty = SparseCase(clean.case, TopK(ids, logprobs))
    weights = weights_of(clean)
    loss = objective_of(dirty, backend, weights)
    assert torch.equal(loss, objective_of(clean, backend, weights))
    assert_close(gradients(loss, dirty), expected_gradients(clean, weights)[1], GRADIENT, kit)
    stats = stats_of(dirty, backend)
    assert (stats.reverse_kl[dropped] == 0).all() and (stats.teacher_argmax[dropped] == -1).all()


@pytest.mark.parametrize("k", [6, 113])
def test_equal_models_have_no_divergence_and_no_gradient(k, backend, kit):
    case = kit.make_case(rows=20, noise=0.0, teacher_hidden=16)
    case = case.with_(teacher_hidden=case.student_hidden.detach(), teacher_weight=case.student_weight.detach())
    case = sparse(case, k)
    for name in DIVERGENCES:
        stats = stats_of(case, backend, fields=(name,))
        if name != INTERPOLATED:  # the entropy of its target
            assert getattr(stats, name).abs().max() < 1e-6, name
        if name != "tvd":  # whose gradient is of signs: rounded logarithms decide them, any is a subgradient
            for gradient in gradients(getattr(stats, name).sum(), case).values():
                assert gradient.abs().max() < 2e-6, name


@pytest.mark.parametrize("offset", [300.0, 1e4])
def test_a_common_offset_costs_no_more_than_the_logits_it_is_in(offset, backend, kit):
    """A log-sum-exp of 300 has an ulp of 3e-5; the small KL of two close rows must not."""
    base = random_logits(kit, rows=16, vocab=64)
    student = base + offset
    teacher = (student.double() - offset + 0.01 * random_logits(kit, rows=16, vocab=64, seed=1)).log_softmax(1)
    logprobs, ids = teacher.topk(8, 1)
    case = with_logits(kit, student, TopK(ids, logprobs.float()))
    expected, leaves = oracle(case)
    stats = stats_of(case, backend, fields=DIVERGENCES)
    for name in DIVERGENCES:
        assert kit.relative_error(getattr(stats, name), expected[name]) < 2e-3, name
        actual = gradients(getattr(stats_of(case, backend, fields=(name,)), name).sum(), case)["hidden"]
        wanted = torch.autograd.grad(expected[name].sum(), leaves["hidden"], retain_graph=True)[0]
        if name != "tvd":  # of signs, which rounding decides in outcomes that are equal
            assert kit.relative_error(actual, wanted) < 2e-3, name


def test_huge_logits(backend, kit):
    case = sparse(kit.make_case(rows=8, spread=3000.0, noise=0.02, ignored=0.0), 6)
    expected, _ = oracle(case)
    stats = stats_of(case, backend, fields=FIELDS)
    for name in FIELDS:  # a logit of 1e4 is known to 1e-3 in fp32
        torch.testing.assert_close(getattr(stats, name).double(), expected[name], rtol=5e-3, atol=2e-2)
        actual = gradients(getattr(stats_of(case, backend, fields=(name, "tvd")), name).sum(), case)
        assert all(value.isfinite().all() for value in actual.values()), name


@pytest.mark.parametrize("mask", [-300.0, -1e9, torch.finfo(torch.float32).min / 2])
def test_a_finite_mask_over_the_first_ids(mask, backend, kit):
    """More of them than a block holds."""
    case = kit.make_case(rows=3, vocab=2300, bias=True, ignored=0.0)
    case.labels[:] = 2299
    case.student_bias.data[:2200] += mask
    case.teacher_bias[:2200] += mask
    case = sparse(case, 5)
    expected, _ = oracle(case)
    stats = stats_of(case, backend, fields=FIELDS)
    for name in FIELDS:
        assert kit.relative_error(getattr(stats, name), expected[name]) < 1e-5, name
    weights = weights_of(case)
    actual = gradients(objective_of(case, backend, weights), case)
    assert_close(actual, expected_gradients(case, weights)[1], 1e-4, kit)


def test_the_lowest_of_equals_is_the_argmax_wherever_it_is(backend, kit):
    student = torch.zeros(3, 30, device=kit.device)
    student[0, [2, 17]] = 1.0  # 17 is among the ids
    student[1, [5, 17]] = 1.0
    student[1, 5], student[2, 8] = 2.0, 3.0
    ids = torch.tensor([[17, 1], [5, 17], [0, 1]], device=kit.device)
    top_k = TopK(ids, torch.full((3, 2), -2.0, device=kit.device))
    hidden, weight = student, torch.eye(30, device=kit.device)
    stats = linear_token_stats(
        hidden, weight, top_k, None, None, fields=("student_argmax", "reverse_kl"), backend=backend
    )
    assert stats.student_argmax.tolist() == [2, 5, 8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("label", [2, 1, 70])
def test_half_precision_gradients_are_rounded_once(label, dtype, backend, kit):
    """q(label) is close to 1 in the tail or among the ids: 1 - q(label) of a rounded q would have no digit left."""
    student = random_logits(kit, rows=3, vocab=80)
    student[:, label] = 12.0
    ids = torch.tensor([[5, 2, 9]] * 3, device=kit.device)
    logprobs = torch.tensor([[0.5, 0.3, 0.1]] * 3, device=kit.device).log()
    labels = torch.full((3,), label, device=kit.device)
    spec = RowSpec(("student_logprob", "student_entropy", "reverse_kl"))
    rows = importlib.import_module(f"minillm.kernels.sparse_teacher_{backend}").ROWS
    teacher = SparseRows(ids, logprobs)
    found = rows.row_statistics(student.clone(), teacher, labels, spec)
    ones = {"student_logprob": torch.ones(3, device=kit.device)}
    exact = rows.row_gradients(student.clone(), teacher, labels, found, ones, spec, torch.float32)
    half = rows.row_gradients(student.clone(), teacher, labels, found, ones, spec, dtype)
    assert half.dtype == dtype and 1e-5 < exact[:, label].abs().max() < 1e-2
    torch.testing.assert_close(half, exact.to(dtype), rtol=0.01, atol=1e-7)


def test_the_teacher_is_detached_silently(backend, kit):
    case = sparse(kit.make_case(), 5)
    case.top_k.logprobs.requires_grad_()
    linear_divergence(*case.arguments[:4], labels=case.labels, backend=backend).backward()
    assert case.student_weight.grad is not None and case.top_k.logprobs.grad is None
