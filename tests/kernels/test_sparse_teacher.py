"""A TopK teacher, over every backend that takes one: values and gradients against float64, options and shapes."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from minillm.losses import TopK, linear_divergence, linear_objective, linear_token_stats
from tests.kernels.contract import (
    ENTRIES,
    GRADIENT,
    STATS,
    assert_close,
    assert_statistics,
    gradients,
    loss_by,
    objective_of,
    stats_of,
)
from tests.kernels.top_k import DIVERGENCES, FIELDS, expected_gradients, oracle, sparse, weights_of

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 1.7},
    "scale": {"student_options": {"logit_scale": 0.6}, "teacher_options": {"logit_scale": 0.8}},
    "softcap": {"student_options": {"softcap": 5.0}, "temperature": 0.8},
    "everything": {"bias": True, "temperature": 0.7, "student_options": {"logit_scale": 0.6, "softcap": 6.0}},
    "vocab_size": {"vocab": 113, "teacher_vocab": 127, "vocab_size": 101, "bias": True},
}


@pytest.mark.parametrize("k", [1, 8, 101])
@pytest.mark.parametrize("options", OPTIONS)
def test_every_statistic_matches_float64(options, k, backend, kit):
    case = sparse(kit.make_case(**OPTIONS[options]), k)
    stats = stats_of(case, backend, fields=(*FIELDS, "student_argmax", "teacher_argmax"), chunk_bytes=4000)
    expected, _ = oracle(case)
    assert_statistics(stats, expected, case.kept, FIELDS, kit)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("options", ["plain", "everything"])
@pytest.mark.parametrize("name", FIELDS)
def test_each_gradient_matches_float64(name, options, entry, backend, kit):
    case = sparse(kit.make_case(rows=9, **OPTIONS[options]), 8)
    # the label's and the entropy's alone need no teacher
    weights = weights_of(case, (name,) if name in DIVERGENCES else (name, "reverse_kl"))
    loss = loss_by(entry, case, backend, weights)
    loss64, expected = expected_gradients(case, weights)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=1e-5)
    assert_close(gradients(loss, case), expected, GRADIENT, kit)


# one id, almost all ids, and all options between: where the label and the tail are differs
@pytest.mark.parametrize(("options", "k"), [*((name, 8) for name in OPTIONS), ("everything", 1), ("vocab_size", 100)])
@pytest.mark.parametrize("entry", ENTRIES)
def test_the_gradient_of_all_statistics_at_once(options, k, entry, backend, kit):
    case = sparse(kit.make_case(**OPTIONS[options]), k)
    weights = weights_of(case)
    loss = loss_by(entry, case, backend, weights, chunk_bytes=4000)
    loss64, expected = expected_gradients(case, weights)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=1e-5)
    assert_close(gradients(loss, case), expected, GRADIENT, kit)


@pytest.mark.parametrize("options", ["plain", "everything", "vocab_size"])
def test_all_ids_are_the_whole_teacher(options, backend, kit):
    """k = V against the teacher's hidden states: the same statistics and gradients, its argmax and label among them."""
    whole = kit.make_case(**OPTIONS[options])
    case = sparse(whole, whole.vocab_size or 113)
    names = (*FIELDS, "teacher_logprob")
    found, wanted = (stats_of(one, backend, fields=(*names, "teacher_argmax")) for one in (case, whole))
    assert torch.equal(found.teacher_argmax, wanted.teacher_argmax)
    torch.testing.assert_close(found.reward, wanted.reward, rtol=1e-5, atol=5e-6)
    for name in names:
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), rtol=1e-5, atol=2e-6, msg=name)
    weights = weights_of(case)
    actual, expected = (gradients(objective_of(one, backend, weights), whole) for one in (case, whole))
    assert_close(actual, expected, GRADIENT, kit)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_and_their_reductions(divergence, reduction, backend, kit):
    case = sparse(kit.make_case(rows=(2, 8), temperature=1.4), 6)
    options = {"divergence": divergence, "labels": case.labels, "backend": backend, **case.options}
    loss = linear_divergence(*case.arguments[:4], reduction=reduction, **options)
    expected, leaves = oracle(case)
    if reduction == "none":
        assert loss.shape == (2, 8) and (loss.flatten()[~case.kept] == 0).all()
        assert kit.relative_error(loss.flatten()[case.kept], expected[divergence]) < 2e-6
        loss = loss.sum()
    wanted = expected[divergence].mean() if reduction == "mean" else expected[divergence].sum()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
    exact = dict(zip(leaves, torch.autograd.grad(wanted, list(leaves.values())), strict=True))
    assert_close(gradients(loss, case), exact, GRADIENT, kit)


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # shrinking takes minutes in Triton's interpreter
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@example(rows=5, vocab=1, k=1, hidden=3, ignored=0.0, chunk_bytes=2000, bias=True, ids=torch.int32, seed=0)
@example(rows=9, vocab=33, k=33, hidden=3, ignored=0.0, chunk_bytes=2000, bias=False, ids=torch.int64, seed=0)
@given(
    rows=st.integers(0, 24),
    vocab=st.integers(1, 90),
    k=st.integers(1, 90),
    hidden=st.integers(1, 20),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    chunk_bytes=st.integers(2000, 40_000),
    bias=st.booleans(),
    ids=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 1000),
)
def test_any_shape(backend, kit, rows, vocab, k, hidden, ignored, chunk_bytes, bias, ids, seed):
    dense = kit.make_case(rows=rows, vocab=vocab, hidden=hidden, ignored=ignored, bias=bias, seed=seed)
    case = sparse(dense, min(k, vocab), ids=ids)
    weights = weights_of(case)
    loss = objective_of(case, backend, weights, chunk_bytes=chunk_bytes)
    loss64, expected = expected_gradients(case, weights)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-4, atol=1e-4)
    for name, value in gradients(loss, case).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    ("vocab", "k"), [(1, 1), (2, 1), (127, 64), (4096, 1), (4096, 1100), (50257, 64), (151936, 64)]
)
def test_vocabulary_sizes(vocab, k, backend, kit):
    """4096 and 1100: several blocks of the tail, and of the outcomes."""
    if kit.interpreted(backend) and vocab > 5000:
        pytest.skip("Triton's interpreter takes 15 s for it; 4096 has several blocks already")
    case = sparse(kit.make_case(rows=3, vocab=vocab, hidden=4, teacher_hidden=4, ignored=0.0), k)
    weights = weights_of(case)
    loss64, expected = expected_gradients(case, weights)
    loss = objective_of(case, backend, weights)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=1e-5)
    for name, value in gradients(loss, case).items():
        torch.testing.assert_close(value.double(), expected[name], rtol=GRADIENT, atol=2e-5)


@pytest.mark.parametrize("entry", ENTRIES)
def test_bfloat16_students_keep_float32_logits(entry, backend, kit):
    case = sparse(kit.make_case(rows=20, dtype=torch.bfloat16, bias=True, noise=0.05), 8)
    expected, _ = oracle(case)
    stats = stats_of(case, backend, fields=FIELDS)
    for name in FIELDS:
        assert getattr(stats, name).dtype == torch.float32
        assert kit.relative_error(getattr(stats, name)[case.kept], expected[name]) < 2e-5, name
    weights = weights_of(case)
    actual = gradients(loss_by(entry, case, backend, weights), case)
    assert all(value.dtype == torch.bfloat16 for value in actual.values())
    assert_close(actual, expected_gradients(case, weights)[1], 5e-3, kit)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logprobs_of_any_precision_are_taken_as_they_are(dtype, backend, kit):
    case = sparse(kit.make_case(rows=20), 8, logprobs=dtype)
    expected, _ = oracle(case)
    stats = stats_of(case, backend, fields=FIELDS)
    for name in FIELDS:
        assert getattr(stats, name).dtype == torch.float32
        assert kit.relative_error(getattr(stats, name)[case.kept], expected[name]) < STATS, name


def test_float64_stays_float64(kit):
    case = kit.make_case().doubled()
    case = sparse(case, 8, logprobs=torch.float64)
    stats = stats_of(case, "triton" if "triton" in kit.backends else "torch")
    expected, _ = oracle(case, least_tail=2.0**-52)
    for name in ("reverse_kl", "student_entropy"):
        assert getattr(stats, name).dtype == torch.float64
        assert kit.relative_error(getattr(stats, name)[case.kept], expected[name]) < 1e-13


@pytest.mark.parametrize("entry", ENTRIES)
def test_under_autocast_as_a_linear_layer_would(entry, backend, kit):
    """bf16 operands, fp32 logits, gradients in the dtypes of the inputs."""
    case = sparse(kit.make_case(rows=20, bias=True), 8)
    rounded = case.with_(
        student_hidden=case.student_hidden.detach().bfloat16().requires_grad_(),
        student_weight=case.student_weight.detach().bfloat16().requires_grad_(),
    )
    weights = weights_of(case)
    with torch.autocast(kit.device, torch.bfloat16):
        loss = loss_by(entry, case, backend, weights)
    loss64, expected = expected_gradients(rounded, weights)
    torch.testing.assert_close(loss.double(), loss64, rtol=1e-5, atol=1e-5)
    actual = gradients(loss, case)
    assert all(value.dtype == torch.float32 for value in actual.values())
    assert_close(actual, expected, 5e-3, kit)


def test_leading_dimensions_are_kept(backend, kit):
    case = sparse(kit.make_case(rows=(2, 3, 2)), 5)
    stats = stats_of(case, backend)
    assert stats.reverse_kl.shape == (2, 3, 2) and stats.student_argmax.shape == (2, 3, 2)
    expected, _ = oracle(case)
    assert kit.relative_error(stats.reverse_kl.flatten()[case.kept], expected["reverse_kl"]) < STATS
    one = TopK(case.top_k.ids[0, 0, 0], case.top_k.logprobs[0, 0, 0])
    alone = linear_token_stats(case.student_hidden[0, 0, 0], case.student_weight, one, None, None, backend=backend)
    assert alone.reverse_kl.shape == ()


def test_strided_and_int32_rows(backend, kit):
    plain = sparse(kit.make_case(rows=20), 7)
    ids = plain.top_k.ids.int().t().contiguous().t()
    logprobs = torch.stack((plain.top_k.logprobs,) * 2, 2)[:, :, 0]
    assert not ids.is_contiguous() and not logprobs.is_contiguous()
    strided = sparse(kit.make_case(rows=20), 7)
    strided.top_k = TopK(ids, logprobs)
    weights = weights_of(plain)
    losses = [objective_of(case, backend, weights) for case in (plain, strided)]
    assert torch.equal(*losses)
    for name, value in gradients(losses[1], strided).items():
        assert torch.equal(value, gradients(objective_of(plain, backend, weights), plain)[name]), name


def test_no_labels_keep_every_row(backend, kit):
    case = sparse(kit.make_case(ignored=0.0), 6)
    labelled = linear_divergence(*case.arguments[:4], labels=case.labels, backend=backend)
    assert torch.equal(linear_divergence(*case.arguments[:4], backend=backend), labelled)
    stats = linear_token_stats(*case.arguments[:4], None, backend=backend)
    assert stats.fields == ("reverse_kl", "forward_kl", "student_entropy", "student_argmax", "teacher_argmax")


@pytest.mark.parametrize("rows", [0, 7])
def test_nothing_kept_is_a_connected_zero(rows, backend, kit):
    case = sparse(kit.make_case(rows=rows, ignored=1.0, bias=True), 4)
    loss, metrics = linear_objective(
        *case.arguments,
        lambda stats: (stats.jsd, {"kl": stats.reverse_kl}),
        fields=("jsd", "reverse_kl"),
        backend=backend,
    )
    stats = stats_of(case, backend, fields=FIELDS)
    mean = linear_divergence(*case.arguments[:4], labels=case.labels, backend=backend)
    assert all(value.item() == 0 for value in (loss, metrics["kl"], stats.reverse_kl.sum(), mean))
    for value in (loss, stats.reverse_kl.sum(), mean):
        for name, gradient in gradients(value, case).items():
            assert gradient.shape == case.leaves[name].shape and (gradient == 0).all()


def test_chunks_change_only_rounding(backend, kit):
    case = sparse(kit.make_case(rows=19), 9)
    weights = weights_of(case)
    whole = stats_of(case, backend, fields=FIELDS)
    expected = gradients(objective_of(case, backend, weights), case)
    for chunk_bytes in (4 * 200 * 7, 4 * 200 * 16) if kit.interpreted(backend) else (1, 4 * 113 * 7):
        cut = stats_of(case, backend, fields=FIELDS, chunk_bytes=chunk_bytes)
        for name in FIELDS:
            torch.testing.assert_close(getattr(cut, name), getattr(whole, name), rtol=1e-5, atol=2e-6)
        actual = gradients(objective_of(case, backend, weights, chunk_bytes=chunk_bytes), case)
        assert_close(actual, expected, 2e-6, kit)


def test_bit_identical_from_run_to_run(backend, kit):
    case = sparse(kit.make_case(rows=12, bias=True), 9)
    weights = weights_of(case)
    runs = [gradients(objective_of(case, backend, weights, chunk_bytes=4000), case) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_the_label_may_stand_beside_the_likeliest(backend, kit):
    """What a server says of a sampled token: then its log-probability, and with it the reward, is known."""
    case = sparse(kit.make_case(ignored=0.3), 6)
    with torch.no_grad():
        logprobs = torch.log_softmax(case.teacher_hidden.double() @ case.teacher_weight.double().t(), 1)
    ids, labels = case.top_k.ids.clone(), case.labels.clamp(min=0)
    absent = (ids != labels[:, None]).all(1)
    ids[absent, 0] = labels[absent]
    case.top_k = TopK(ids, logprobs.gather(1, ids).float())
    stats = stats_of(case, backend, fields=("student_logprob", "teacher_logprob", "reverse_kl"))
    expected, _ = oracle(case)
    assert expected["teacher_logprob"].isfinite().all() and absent.any()
    for name in ("student_logprob", "teacher_logprob", "reverse_kl"):
        assert kit.relative_error(getattr(stats, name)[case.kept], expected[name]) < STATS, name
    assert (stats.reward[~case.kept] == 0).all() and not stats.teacher_logprob.requires_grad


def test_the_argmax_is_said_where_it_is_certain(backend, kit):
    probabilities = torch.tensor([[0.5, 0.2], [0.2, 0.3], [0.4, 0.4], [0.3, 0.35]], device=kit.device)
    ids = torch.tensor([[9, 4], [9, 4], [9, 4], [4, 9]], device=kit.device)
    top_k = TopK(ids, probabilities.log())  # the tails hold 0.3, 0.5, 0.2 and 0.35
    hidden, weight = torch.randn(4, 3, device=kit.device), torch.randn(20, 3, device=kit.device)
    stats = linear_token_stats(hidden, weight, top_k, None, None, fields=("teacher_argmax",), backend=backend)
    assert stats.teacher_argmax.tolist()[:3] == [9, -1, 4]  # likelier than the tail; not; the lower of two equals
    assert stats.teacher_argmax[3] in (-1, 9)  # as likely as all others together, to rounding
