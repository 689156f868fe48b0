"""The row operations of every backend on raw logits: padded and huge strides, what is kept, the transform's ends."""

import importlib
import math

import pytest
import torch

from minillm.kernels import rows_torch
from minillm.kernels.divergences import DIVERGENCES, FIELDS, RowSpec

FLOATS = tuple(name for name in FIELDS if not name.endswith("argmax"))
DIFFERENTIABLE = tuple(name for name, field in FIELDS.items() if field.differentiable)
TARGET = ("interpolated_cross_entropy",)


def operations(backend):
    return importlib.import_module(f"minillm.kernels.rows_{backend}")


def logits(rows, vocab, kit, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, vocab, generator=generator) * 3
    teacher = student + torch.randn(rows, vocab, generator=generator)
    labels = torch.randint(0, vocab, (rows,), generator=generator)
    return student.to(kit.device), teacher.to(kit.device), labels.to(kit.device)


def ones(rows, kit):
    return {name: torch.ones(rows, device=kit.device) for name in DIFFERENTIABLE}


def test_statistics_leave_the_logits_alone(backend, kit):
    student, teacher, labels = logits(4, 50, kit)
    before = student.clone(), teacher.clone()
    found = operations(backend).row_statistics(student, teacher, labels, RowSpec(tuple(FIELDS), temperature=2.0))
    assert torch.equal(student, before[0]) and torch.equal(teacher, before[1])
    assert set(FIELDS) <= set(found)
    for who, z in (("student", student / 2), ("teacher", teacher / 2)):
        assert torch.equal(found[f"{who}_max"], z.amax(1))
        torch.testing.assert_close(found[f"{who}_max"] + found[f"{who}_log_sum"], z.logsumexp(1))
    assert found["student_argmax"].dtype == torch.int64


def test_padded_rows_are_the_same_rows(backend, kit):
    student, teacher, labels = logits(5, 37, kit)
    padded = torch.full((5, 48), math.nan, device=kit.device)[:, :37].copy_(student)
    other = torch.full((5, 64), math.nan, device=kit.device)[:, :37].copy_(teacher)
    spec, rows = RowSpec(FLOATS), operations(backend)
    plain, strided = (
        rows.row_statistics(student, teacher, labels, spec),
        rows.row_statistics(padded, other, labels, spec),
    )
    for name in FLOATS:
        torch.testing.assert_close(strided[name], plain[name], rtol=1e-6, atol=1e-6)
    gradients = [
        rows.row_gradients(s, t, labels, found, ones(5, kit), spec, torch.float32)
        for s, t, found in ((student.clone(), teacher.clone(), plain), (padded, other, strided))
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


@pytest.fixture
def memory_given_back():
    """Tests run side by side on one GPU, and torch keeps what it was given."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# strides that need 64 bits of their own, and strides that need them times the index of a row
@pytest.mark.parametrize(("count", "stride"), [(2, 2**31 + 8), (3, 2**30 + 8)])
def test_rows_more_than_two_to_the_31_elements_apart(count, stride, backend, kit, memory_given_back):
    """Memory is touched in these rows alone: the operating system gives pages as they are used."""
    student, teacher, labels = logits(count, 40, kit)
    try:
        far = torch.empty(2**31 + 64, device=kit.device)
    except RuntimeError:
        pytest.skip("8 GiB of address space are not to be had here")
    apart = far.as_strided((count, 40), (stride, 1))
    apart.copy_(student)
    spec, rows = RowSpec(FLOATS), operations(backend)
    near = rows.row_statistics(student, teacher, labels, spec)
    found = rows.row_statistics(apart, teacher, labels, spec)
    for name in FLOATS:
        torch.testing.assert_close(found[name], near[name], rtol=1e-6, atol=1e-6)
    expected = rows.row_gradients(student, teacher.clone(), labels, near, ones(count, kit), spec, torch.float32)
    gradient = rows.row_gradients(apart, teacher, labels, found, ones(count, kit), spec, torch.float32)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [("student_logprob",), ("student_entropy",), ("student_logprob", "student_entropy")])
def test_a_gradient_of_the_student_alone_needs_no_teacher(names, backend, kit):
    student, teacher, labels = logits(3, 30, kit)
    spec, rows = RowSpec(FLOATS), operations(backend)
    found = rows.row_statistics(student, teacher, labels, spec)
    weights = {name: torch.full((3,), 1.5, device=kit.device) for name in names}
    leaf = student.double().requires_grad_()
    log_q = leaf.log_softmax(-1)
    entropy = -(log_q.exp() * log_q).sum(-1)
    chosen = {"student_logprob": log_q.gather(1, labels[:, None])[:, 0], "student_entropy": entropy}
    expected = torch.autograd.grad(sum(1.5 * chosen[name] for name in names).sum(), leaf)[0]
    actual = rows.row_gradients(student, None, labels, found, weights, spec, torch.float32)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gradients_are_rounded_once(dtype, backend, kit):
    student, teacher, labels = logits(3, 3000, kit)
    spec, rows = RowSpec(FLOATS), operations(backend)
    found = rows.row_statistics(student, teacher, labels, spec)
    exact = rows.row_gradients(student.clone(), teacher.clone(), labels, found, ones(3, kit), spec, torch.float32)
    half = rows.row_gradients(student, teacher, labels, found, ones(3, kit), spec, dtype)
    assert half.dtype == dtype and half.shape == (3, 3000) and half.stride(1) == 1
    torch.testing.assert_close(half, exact.to(dtype), rtol=0.01, atol=1e-6)


def test_a_saturated_softcap_passes_no_gradient(backend, kit):
    student, teacher, labels = logits(2, 20, kit)
    with torch.no_grad():
        student[0, 4], student[1, 6] = 1e5, -1e5
    spec = RowSpec(FLOATS, student_softcap=30.0, teacher_softcap=30.0, temperature=0.5)
    rows = operations(backend)
    found = rows.row_statistics(student, teacher, labels, spec)
    assert all(value.isfinite().all() for value in found.values())
    gradient = rows.row_gradients(student, teacher, labels, found, ones(2, kit), spec, torch.float32)
    assert gradient.isfinite().all() and gradient[0, 4] == 0 and gradient[1, 6] == 0


@pytest.mark.parametrize("banned", [3, 9_000, 19_999])
def test_an_infinite_divergence_is_seen_in_every_block(banned, backend, kit):
    student, teacher, labels = logits(2, 20_000, kit)
    teacher[0, banned] = student[1, banned] = -math.inf
    found = operations(backend).row_statistics(student, teacher, labels, RowSpec(("reverse_kl", "forward_kl")))
    assert found["reverse_kl"].isinf().tolist() == [True, False]
    assert found["forward_kl"].isinf().tolist() == [False, True]


def test_the_total_variation_has_no_slope_where_the_models_agree(backend, kit):
    """q = (1/2, 1/2, 0) and p = (1/2, 0, 1/2): the sign of q - p is 0, 1 and -1, exactly."""
    student = torch.tensor([[0.0, 0.0, -200.0]], device=kit.device)
    teacher = torch.tensor([[0.0, -200.0, 0.0]], device=kit.device)
    spec, rows = RowSpec(("tvd",)), operations(backend)
    found = rows.row_statistics(student, teacher, None, spec)
    weights = {"tvd": torch.ones(1, device=kit.device)}
    gradient = rows.row_gradients(student, teacher, None, found, weights, spec, torch.float32)
    torch.testing.assert_close(gradient, torch.tensor([[-0.125, 0.125, 0.0]], device=kit.device))


def test_no_id_at_all_is_nan(backend, kit):
    student, teacher, labels = logits(3, 20, kit)
    student[1] = teacher[2] = -math.inf
    found = operations(backend).row_statistics(student, teacher, labels, RowSpec(FLOATS))
    for name in ("student_log_sum", "student_logprob", "student_entropy"):
        assert found[name].isnan().tolist() == [False, True, False], name
    for name in ("teacher_log_sum", "teacher_logprob", "teacher_entropy"):
        assert found[name].isnan().tolist() == [False, False, True], name
    for name in DIVERGENCES:
        assert found[name].isnan().tolist() == [False, True, True], name


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize(
    "names", [("reverse_kl",), ("student_logprob", "forward_kl"), ("jsd", "tvd"), TARGET, DIFFERENTIABLE]
)
def test_one_pass_is_the_two_operations(names, softcap, backend, kit, monkeypatch):
    """Coefficients that differ from row to row, one of them zero, with banned ids in either model and in both."""
    monkeypatch.setattr(rows_torch, "BLOCK_BYTES", 3 * 40 * 4)  # three rows a block, and a remnant
    student, teacher, labels = logits(7, 40, kit)
    student[:, 3] = teacher[:, 3] = -math.inf
    student[1, 5] = teacher[2, 6] = -math.inf
    labels[:] = 7
    spec = RowSpec(tuple(FIELDS), temperature=2.0, student_softcap=softcap)
    rows = operations(backend)
    weights = {name: torch.arange(7.0, device=kit.device) - 2 for name in names}
    for name in names:  # where a divergence is infinite its gradient is not asked for
        weights[name][1:3] = 0.0
    found = rows.row_statistics(student, teacher, labels, spec)
    expected = rows.row_gradients(student.clone(), teacher, labels, found, weights, spec, torch.float32)
    seen = []

    def differentiate(part, statistics):
        seen.append(statistics)
        return {name: value[part] for name, value in weights.items()}

    gradient = rows.row_loss_gradients(student, teacher, labels, spec, differentiate, torch.float32)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    for name in FIELDS:
        assert torch.equal(torch.cat([statistics[name] for statistics in seen]), found[name])


def test_no_coefficients_are_no_gradient(backend, kit):
    student, teacher, labels = logits(3, 30, kit)
    rows = operations(backend)
    assert rows.row_loss_gradients(student, teacher, labels, RowSpec(FLOATS), lambda *_: {}, torch.float32) is None
