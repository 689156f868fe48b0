"""The Triton row kernels on several blocks of ids, the last one not whole, and at their guards, against float64."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from minillm.kernels import reference, rows_triton  # noqa: E402
from minillm.kernels.divergences import FIELDS, RowSpec  # noqa: E402

VOCAB = 2500  # two whole blocks of the statistics and one of the gradient, and a remnant of each
FLOATS = tuple(name for name in FIELDS if not name.endswith("argmax"))
DIFFERENTIABLE = tuple(name for name, field in FIELDS.items() if field.differentiable)
FIRST_BLOCKS = slice(0, 2100)


def logits(kit, rows=3, vocab=VOCAB):
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(rows, vocab, generator=generator) * 2
    teacher = student + torch.randn(rows, vocab, generator=generator)
    labels = torch.tensor([2110, VOCAB - 1, 2300])[:rows]
    return student.to(kit.device), teacher.to(kit.device), labels.to(kit.device)


def assert_fields(found, expected, names=tuple(FIELDS)):
    for name in names:
        wanted = expected[name].to(found[name].dtype)
        torch.testing.assert_close(found[name], wanted, rtol=3e-6, atol=3e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("banned", [False, True])
def test_several_blocks_and_a_remnant(banned, kit):
    """Whole blocks that both models ban, the first of all among them, are as if they were not there."""
    student, teacher, labels = logits(kit)
    first = FIRST_BLOCKS.stop if banned else 0
    for model in (student, teacher):
        model[:, :first] = -math.inf
    spec = RowSpec(tuple(FIELDS), temperature=1.5, beta=0.3, alpha=0.2)
    found = rows_triton.row_statistics(student, teacher, labels, spec)
    leaf = student[:, first:].double().requires_grad_()
    expected = reference.token_stats(leaf / 1.5, teacher[:, first:].double() / 1.5, labels - first, beta=0.3, alpha=0.2)
    for name in ("student_argmax", "teacher_argmax"):
        expected[name] = expected[name] + first
    assert_fields(found, expected)
    weights = {
        name: torch.tensor([1.0, -0.5, 0.7], device=kit.device) * (n + 1) for n, name in enumerate(DIFFERENTIABLE)
    }
    loss = sum((weights[name] * expected[name]).sum() for name in DIFFERENTIABLE)
    gradient = rows_triton.row_gradients(student, teacher, labels, found, weights, spec, torch.float32)
    assert (gradient[:, :first] == 0).all()
    torch.testing.assert_close(gradient[:, first:].double(), torch.autograd.grad(loss, leaf)[0], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("columns", [FIRST_BLOCKS, 5, 1500, 2400])
def test_ids_that_one_model_bans_in_any_block(columns, who, kit):
    """One of the two KLs is infinite in that row, and it alone; everything else is finite and right."""
    student, teacher, labels = logits(kit)
    (student if who == "student" else teacher)[1, columns] = -math.inf
    found = rows_triton.row_statistics(student, teacher, labels, RowSpec(tuple(FIELDS)))
    infinite = "forward_kl" if who == "student" else "reverse_kl"
    assert found[infinite].isinf().tolist() == [False, True, False]
    assert all(found[name].isfinite().all() for name in FLOATS if name != infinite)
    assert_fields(found, reference.token_stats(student.double(), teacher.double(), labels))


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_launch_is_as_two(name, grad_dtype, kit):
    """Where coefficients are known beforehand: the same statistics, and the same gradient in the memory of the logits."""
    student, teacher, labels = logits(kit)
    if not FIELDS[name].teacher:
        teacher = None
    spec = RowSpec((name,), temperature=1.5, beta=0.3, alpha=0.2, student_softcap=9.0)
    ours, theirs = student.clone(), teacher
    found, gradient = rows_triton.row_known_gradients(ours, theirs, labels, spec, {name: -0.7}, grad_dtype)
    assert gradient.dtype == grad_dtype and gradient.data_ptr() == ours.data_ptr()
    statistics = rows_triton.row_statistics(student, teacher, labels, spec)
    weights = {name: torch.full((3,), -0.7, device=kit.device)}
    expected = rows_triton.row_gradients(student, teacher, labels, statistics, weights, spec, grad_dtype)
    assert set(found) == {name}
    torch.testing.assert_close(found[name], statistics[name], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, expected, rtol=1e-5 if grad_dtype == torch.float32 else 8e-3, atol=1e-7)
    assert expected.abs().sum() > 0


def test_argmax_takes_the_lowest_of_equals_in_different_blocks(kit):
    student = torch.zeros(3, VOCAB, device=kit.device)
    student[0, [77, 130, 1101, 2125]] = 1.0  # 1101 and 2125 lie one and two blocks behind 77
    student[1, [1101, 2125, 2499]] = 1.0
    student[2, [1500, 2049]] = 1.0  # the higher id has the lower place in its block
    spec = RowSpec(("student_argmax", "teacher_argmax"))
    found = rows_triton.row_statistics(student, student.clone(), None, spec)
    assert found["student_argmax"].tolist() == found["teacher_argmax"].tolist() == [77, 1101, 1500]


def test_no_id_at_all_is_nan_in_everything_that_reads_the_row(kit):
    student, teacher, labels = logits(kit)
    student[0], teacher[1] = -math.inf, -math.inf
    found = rows_triton.row_statistics(student, teacher, labels, RowSpec(FLOATS))
    for name in (*FLOATS, "student_log_sum", "teacher_log_sum"):
        reads_student, reads_teacher = not name.startswith("teacher"), not name.startswith("student")
        assert found[name].isnan().tolist() == [reads_student, reads_teacher, False], name


def test_a_nan_is_not_hidden_by_an_infinite_divergence(kit):
    student, teacher, labels = logits(kit)
    student[1, 2] = math.nan
    teacher[:, 5] = -math.inf
    student[:, 6] = -math.inf
    found = rows_triton.row_statistics(student, teacher, labels, RowSpec(("reverse_kl", "forward_kl")))
    for name in ("reverse_kl", "forward_kl"):
        assert found[name].isinf().tolist() == [True, False, True] and found[name][1].isnan(), name


def test_the_softcap_is_a_tanh_to_the_last_digits(kit):
    """A row of one id: its log-sum-exp is its logit."""
    sizes = (
        1e-6,
        1e-3,
        0.05,
        0.1,
        0.15,
        0.2,
        0.22,
        0.24,
        0.249,
        0.251,
        0.26,
        0.3,
        0.5,
        1.0,
        2.0,
        4.0,
        8.0,
        15.0,
        100.0,
    )
    raw = torch.tensor([[x] for x in (*sizes, *(-x for x in sizes))], device=kit.device)
    found = rows_triton.row_statistics(raw, None, None, RowSpec(("student_entropy",), student_softcap=1.0))
    rtol = 1e-6 if raw.device.type == "cuda" else 2.5e-7  # a GPU approximates exp2 and division
    torch.testing.assert_close(found["student_max"].double(), raw[:, 0].double().tanh(), rtol=rtol, atol=0.0)
