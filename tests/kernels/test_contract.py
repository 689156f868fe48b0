"""The contract of the fused losses, over every backend: values and gradients against float64, and hostile inputs.

Tolerances are the project's correctness protocol; the oracle is reference.py on full logits with autograd.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from minillm.losses import LMHead, linear_divergence, linear_logprobs, linear_objective, linear_token_stats

STATS, GRADIENT = 1e-6, 1e-5  # relative L2, fp32 inputs
FIELDS = (
    "student_logprob",
    "teacher_logprob",
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
)
DIFFERENTIABLE = tuple(name for name in FIELDS if not name.startswith("teacher"))
OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "scale": {"student_options": {"logit_scale": 0.6}, "teacher_options": {"logit_scale": 0.8}},
    "softcap": {"student_options": {"softcap": 5.0}, "teacher_options": {"softcap": 4.0}, "temperature": 0.8},
    "everything": {
        "bias": True,
        "temperature": 0.7,
        "student_options": {"logit_scale": 0.6, "softcap": 6.0},
        "teacher_options": {"logit_scale": 1.2},
    },
    "vocab_size": {"vocab": 113, "teacher_vocab": 127, "vocab_size": 101, "bias": True},
}


def coefficients(case, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(case.labels.numel(), generator=generator).to(case.labels.device) for name in DIFFERENTIABLE
    }


def stats_of(case, backend, **options):
    return linear_token_stats(*case.arguments, backend=backend, **{**case.options, **options})


def objective_of(case, backend, weights, **options):
    def objective(stats, **weights):
        return sum(weight * getattr(stats, name) for name, weight in weights.items())

    options = {**case.options, "fields": tuple(weights), **options}
    return linear_objective(*case.arguments, objective, inputs=weights, backend=backend, **options)[0]


def gradients(loss, case):
    leaves = case.leaves
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def expected_gradients(case, weights, kit):
    expected, leaves = kit.oracle(case)
    loss = sum((weights[name][case.kept].double() * expected[name]).sum() for name in weights)
    return loss, dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def assert_close(actual, expected, tolerance, kit):
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert kit.relative_error(actual[name], value) < tolerance, name


@pytest.mark.parametrize("options", OPTIONS)
def test_every_statistic_matches_float64(options, backend, kit):
    case = kit.make_case(**OPTIONS[options])
    stats = stats_of(case, backend, fields=(*FIELDS, "student_argmax", "teacher_argmax"), chunk_bytes=4000)
    expected, _ = kit.oracle(case)
    for name in FIELDS:
        value = getattr(stats, name)
        assert value.dtype == torch.float32 and (value[~case.kept] == 0).all(), name
        assert kit.relative_error(value[case.kept], expected[name]) < STATS, name
    for name in ("student_argmax", "teacher_argmax"):
        value = getattr(stats, name)
        assert value.dtype == torch.int64 and (value[~case.kept] == -1).all(), name
        assert torch.equal(value[case.kept], expected[name]), name
    assert torch.equal(stats.reward, stats.teacher_logprob - stats.student_logprob)


def loss_by(entry, case, backend, weights, **options):
    if entry == "objective":
        return objective_of(case, backend, weights, **options)
    stats = stats_of(case, backend, fields=tuple(weights), **options)
    return sum((weight * getattr(stats, name).flatten()).sum() for name, weight in weights.items())


ENTRIES = ["objective", "token_stats"]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_each_gradient_matches_float64(name, options, entry, backend, kit):
    case = kit.make_case(rows=9, **OPTIONS[options])
    weights = {name: coefficients(case)[name]}
    loss = loss_by(entry, case, backend, weights)
    loss64, expected = expected_gradients(case, weights, kit)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=1e-5)
    assert_close(gradients(loss, case), expected, GRADIENT, kit)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_gradient_of_all_statistics_at_once(options, entry, backend, kit):
    case = kit.make_case(**OPTIONS[options])
    weights = coefficients(case)
    loss = loss_by(entry, case, backend, weights, chunk_bytes=4000)
    loss64, expected = expected_gradients(case, weights, kit)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=1e-5)
    assert_close(gradients(loss, case), expected, GRADIENT, kit)


@pytest.mark.parametrize("entry", ENTRIES)
def test_bfloat16_inputs_keep_float32_logits(entry, backend, kit):
    """The teacher is close: bf16 logits would put tens of per cent of error into this reverse KL and its gradient."""
    case = kit.make_case(rows=20, dtype=torch.bfloat16, bias=True, noise=0.05)
    expected, _ = kit.oracle(case)
    stats = stats_of(case, backend, fields=FIELDS)
    for name in FIELDS:
        assert getattr(stats, name).dtype == torch.float32
        assert kit.relative_error(getattr(stats, name)[case.kept], expected[name]) < 1e-5, name
    for names in (("reverse_kl",), DIFFERENTIABLE):
        weights = {name: coefficients(case)[name] for name in names}
        actual = gradients(loss_by(entry, case, backend, weights), case)
        assert all(value.dtype == torch.bfloat16 for value in actual.values())
        assert_close(actual, expected_gradients(case, weights, kit)[1], 5e-3, kit)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes in Triton's interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# a row with q = 1 - 1e-7, where the sign of a log-ratio of 1e-8 decides tvd's gradient
@example(rows=24, vocab=4, hidden=1, teacher_hidden=9, ignored=0.0, chunk_bytes=9000, bias=True, seed=1)
@given(
    rows=st.integers(0, 24),
    vocab=st.integers(1, 90),
    hidden=st.integers(1, 20),
    teacher_hidden=st.integers(1, 20),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    chunk_bytes=st.integers(2000, 40_000),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(backend, kit, rows, vocab, hidden, teacher_hidden, ignored, chunk_bytes, bias, seed):
    case = kit.make_case(
        rows=rows, vocab=vocab, hidden=hidden, teacher_hidden=teacher_hidden, ignored=ignored, bias=bias, seed=seed
    )
    weights = coefficients(case)
    loss = objective_of(case, backend, weights, chunk_bytes=chunk_bytes)
    loss64, expected = expected_gradients(case, weights, kit)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-4, atol=1e-4)
    for name, value in gradients(loss, case).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("vocab", [1, 2, 127, 4096, 50257, 151936])
def test_vocabulary_sizes(vocab, backend, kit):
    if kit.interpreted(backend) and vocab > 5000:
        pytest.skip("Triton's interpreter takes 15 s for it; 4096 has several blocks already")
    case = kit.make_case(rows=3, vocab=vocab, hidden=4, teacher_hidden=4, ignored=0.0)
    weights = coefficients(case)
    loss64, expected = expected_gradients(case, weights, kit)
    loss = objective_of(case, backend, weights)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=1e-5)
    for name, value in gradients(loss, case).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=GRADIENT, atol=2e-5)


@pytest.mark.parametrize(("vocab", "teacher_vocab"), [(113, 90), (90, 113), (113, 113)])
def test_a_shared_vocabulary_is_cut_out_of_both_heads(vocab, teacher_vocab, backend, kit):
    case = kit.make_case(vocab=vocab, teacher_vocab=teacher_vocab, vocab_size=80, bias=True)
    weights = coefficients(case)
    actual = gradients(objective_of(case, backend, weights), case)
    assert actual["weight"].shape == (vocab, 16) and actual["bias"].shape == (vocab,)
    assert (actual["weight"][80:] == 0).all() and (actual["bias"][80:] == 0).all()
    assert_close(actual, expected_gradients(case, weights, kit)[1], GRADIENT, kit)


def test_leading_dimensions_are_kept(backend, kit):
    case = kit.make_case(rows=(2, 3, 2))
    stats = stats_of(case, backend)
    assert stats.reverse_kl.shape == (2, 3, 2) and stats.student_argmax.shape == (2, 3, 2)
    flat = kit.make_case(rows=(2, 3, 2))
    flat = flat.with_(
        student_hidden=flat.student_hidden.flatten(0, 2),
        teacher_hidden=flat.teacher_hidden.flatten(0, 2),
        labels=flat.labels.flatten(),
    )
    assert torch.equal(stats_of(flat, backend).reverse_kl, stats.reverse_kl.flatten())
    weights = coefficients(case)
    loss = objective_of(case, backend, {name: weight.view(2, 3, 2) for name, weight in weights.items()})
    assert_close(gradients(loss, case), expected_gradients(case, weights, kit)[1], GRADIENT, kit)


def test_strided_inputs(backend, kit):
    case = kit.make_case(rows=20, vocab=60, hidden=12, teacher_hidden=8, ignored=0.0)
    transposed = case.student_weight.detach().t().contiguous().t().requires_grad_()
    hidden = torch.stack((case.student_hidden.detach(),) * 2, 1)[:, 0].requires_grad_()
    teacher_weight = torch.cat((case.teacher_weight,) * 2, 1)[:, :8]
    strided = case.with_(student_weight=transposed, student_hidden=hidden, teacher_weight=teacher_weight)
    assert not (transposed.is_contiguous() or hidden.is_contiguous() or teacher_weight.is_contiguous())
    weights = coefficients(case)
    actual = gradients(objective_of(strided, backend, weights), strided)
    assert_close(actual, expected_gradients(case, weights, kit)[1], GRADIENT, kit)
    stats = stats_of(strided, backend)
    sum(weights[name] @ getattr(stats, name) for name in ("reverse_kl", "student_logprob")).backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("rows", [0, 7])
def test_nothing_kept_is_a_connected_zero(rows, backend, kit):
    case = kit.make_case(rows=rows, ignored=1.0, bias=True)
    loss, metrics = linear_objective(
        *case.arguments,
        lambda stats: (stats.jsd, {"kl": stats.reverse_kl}),
        fields=("jsd", "reverse_kl"),
        backend=backend,
    )
    stats = stats_of(case, backend, fields=FIELDS)
    values = [loss, metrics["kl"], stats.reverse_kl.sum(), linear_divergence(*case.arguments[:4], labels=case.labels)]
    assert all(value.item() == 0 for value in values)
    for value in (loss, stats.student_logprob.sum(), values[-1]):
        for name, gradient in gradients(value, case).items():
            assert gradient.shape == case.leaves[name].shape and (gradient == 0).all()


def test_chunks_change_only_rounding(backend, kit):
    case = kit.make_case(rows=19)
    weights = coefficients(case)
    whole = stats_of(case, backend, fields=FIELDS)
    expected = gradients(objective_of(case, backend, weights), case)
    for chunk_bytes in (2 * 4 * 113 * 7, 2 * 4 * 113 * 16) if kit.interpreted(backend) else (1, 2 * 4 * 113 * 7):
        cut = stats_of(case, backend, fields=FIELDS, chunk_bytes=chunk_bytes)
        for name in FIELDS:
            torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=1e-5, atol=2e-6)
        actual = gradients(objective_of(case, backend, weights, chunk_bytes=chunk_bytes), case)
        assert_close(actual, expected, 2e-6, kit)


def test_bit_identical_from_run_to_run(backend, kit):
    case = kit.make_case(rows=12, bias=True)
    weights = coefficients(case)
    runs = [gradients(objective_of(case, backend, weights, chunk_bytes=4000), case) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_weight_gradient_of_many_bfloat16_chunks_is_summed_in_float32(backend, kit):
    rows = 24 if kit.interpreted(backend) else 64
    case = kit.make_case(rows=rows, dtype=torch.bfloat16, ignored=0.0)
    weights = {"reverse_kl": torch.ones(rows, device=kit.device)}
    one = gradients(objective_of(case, backend, weights), case)["weight"]
    many = gradients(objective_of(case, backend, weights, chunk_bytes=1), case)["weight"]
    lossy = gradients(objective_of(case, backend, weights, chunk_bytes=1, weight_grad="bf16"), case)["weight"]
    exact = expected_gradients(case, weights, kit)[1]["weight"]
    assert kit.relative_error(many, exact) < 1.1 * kit.relative_error(one, exact)
    assert kit.relative_error(lossy, exact) > 1.5 * kit.relative_error(one, exact)


# -- hostile numbers -------------------------------------------------------------------------------


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
    for name in ("reverse_kl", "forward_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"):
        assert kit.relative_error(getattr(stats, name), expected[name]) < 2e-4, name


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
    actual = gradients(objective_of(case, backend, weights), case)
    assert (actual["weight"][3] == 0).all() and actual["bias"][3] == 0
    moved = _finite_difference(case, weights, kit)
    assert kit.relative_error(actual["hidden"], moved) < 1e-4
    gradient = gradients(objective_of(case, backend, {"forward_kl": weights["reverse_kl"]}), case)
    assert not any(value.isnan().any() for value in gradient.values())


def _finite_difference(case, weights, kit):
    """d sum(weight * statistic) / d hidden in float64, central differences."""

    def value(shift):
        moved = case.with_(student_hidden=case.student_hidden.detach().double() + shift)
        found = kit.oracle(moved)[0]
        return sum((weight[case.kept].double() * found[name].detach()).sum() for name, weight in weights.items())

    result = torch.zeros_like(case.student_hidden, dtype=torch.float64)
    for index in range(result.numel()):
        shift = torch.zeros_like(result)
        shift.view(-1)[index] = 1e-5
        result.view(-1)[index] = (value(shift) - value(-shift)) / 2e-5
    return result


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
