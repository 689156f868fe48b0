"""The contract of the fused losses, over every backend: values and gradients against float64, options and shapes."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from minillm.losses import linear_cross_entropy, linear_divergence, linear_objective
from tests.kernels.contract import (
    DIFFERENTIABLE,
    ENTRIES,
    FIELDS,
    GRADIENT,
    assert_close,
    assert_statistics,
    coefficients,
    expected_gradients,
    gradients,
    loss_by,
    objective_of,
    stats_of,
)

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


@pytest.mark.parametrize("options", OPTIONS)
def test_every_statistic_matches_float64(options, backend, kit):
    case = kit.make_case(**OPTIONS[options])
    stats = stats_of(case, backend, fields=(*FIELDS, "student_argmax", "teacher_argmax"), chunk_bytes=4000)
    expected, _ = kit.oracle(case)
    assert_statistics(stats, expected, case.kept, FIELDS, kit)
    assert torch.equal(stats.reward, stats.teacher_logprob - stats.student_logprob)


ALL_ENTRIES = [*ENTRIES, "coupled"]


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


@pytest.mark.parametrize("entry", ALL_ENTRIES)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_gradient_of_all_statistics_at_once(options, entry, backend, kit):
    case = kit.make_case(**OPTIONS[options])
    weights = coefficients(case)
    loss = loss_by(entry, case, backend, weights, chunk_bytes=4000)
    loss64, expected = expected_gradients(case, weights, kit)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=1e-5)
    assert_close(gradients(loss, case), expected, GRADIENT, kit)


@pytest.mark.parametrize("entry", ALL_ENTRIES)
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
@example(rows=24, vocab=4, hidden=1, teacher_hidden=9, ignored=0.0, chunk_bytes=9000, bias=True, coupled=False, seed=1)
@given(
    rows=st.integers(0, 24),
    vocab=st.integers(1, 90),
    hidden=st.integers(1, 20),
    teacher_hidden=st.integers(1, 20),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    chunk_bytes=st.integers(2000, 40_000),
    bias=st.booleans(),
    coupled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(backend, kit, rows, vocab, hidden, teacher_hidden, ignored, chunk_bytes, bias, coupled, seed):
    case = kit.make_case(
        rows=rows, vocab=vocab, hidden=hidden, teacher_hidden=teacher_hidden, ignored=ignored, bias=bias, seed=seed
    )
    weights = coefficients(case)
    loss = objective_of(case, backend, weights, chunk_bytes=chunk_bytes, coupled=coupled)
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


@pytest.mark.parametrize("vocab", [2, 1001, 50257])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_at_any_vocabulary(vocab, dtype, backend, kit):
    """Rows of the head and of the logits whose length no tensor core likes."""
    if kit.interpreted(backend) and vocab > 5000:
        pytest.skip("Triton's interpreter takes 15 s for it")
    case = kit.make_case(rows=20, vocab=vocab, hidden=24, teacher_hidden=40, dtype=dtype)
    weights = coefficients(case)
    loss64, expected = expected_gradients(case, weights, kit)
    loss = objective_of(case, backend, weights)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=1e-5)
    assert_close(gradients(loss, case), expected, 5e-3, kit)


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


@pytest.mark.parametrize("label", [5, -100])
def test_one_token_without_leading_dimensions(label, engine, kit):
    """Statistics, losses and gradients have the shapes of one token, and its values."""
    case = kit.make_case(rows=1, bias=True, ignored=0.0)
    case.labels[0] = label
    one = case.with_(
        student_hidden=case.student_hidden.detach()[0].requires_grad_(),
        teacher_hidden=case.teacher_hidden[0],
        labels=case.labels[0],
    )
    with torch.no_grad():
        scored = stats_of(one, engine)
    stats, row = stats_of(one, engine), stats_of(case, engine)
    for name in row.fields:
        assert getattr(stats, name).shape == getattr(scored, name).shape == ()
        assert torch.equal(getattr(stats, name), getattr(row, name)[0]), name
        torch.testing.assert_close(getattr(scored, name), getattr(stats, name))
    losses = [stats.reverse_kl - stats.student_logprob]
    losses.append(linear_divergence(*one.arguments[:4], labels=one.labels, backend=engine))
    losses.append(linear_cross_entropy(*one.arguments[:2], one.labels, reduction="none", backend=engine))
    for loss in losses:
        assert loss.shape == ()
        found = gradients(loss, one)
        assert found["hidden"].shape == (16,) and (found["hidden"].abs().sum() > 0) == (label >= 0)


def test_strided_inputs(backend, kit):
    case = kit.make_case(rows=20, vocab=60, hidden=12, teacher_hidden=8, ignored=0.0)
    transposed = case.student_weight.detach().t().contiguous().t().requires_grad_()
    hidden = torch.stack((case.student_hidden.detach(),) * 2, 1)[:, 0].requires_grad_()
    teacher_weight = torch.cat((case.teacher_weight,) * 2, 1)[:, :8]
    labels = torch.stack((case.labels, torch.zeros_like(case.labels)), 1)[:, 0]
    strided = case.with_(student_weight=transposed, student_hidden=hidden, teacher_weight=teacher_weight, labels=labels)
    assert not any(one.is_contiguous() for one in (transposed, hidden, teacher_weight, labels))
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
