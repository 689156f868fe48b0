"""The cross-entropy to TAID's interpolated target: released values, its ends, bans, and that the target is a constant."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from minillm.losses import LMHead, linear_divergence, linear_objective, linear_token_stats
from tests.kernels.contract import assert_close, gradients

NAME = "interpolated_cross_entropy"
GOLDEN = Path(os.environ.get("MINILLM_GOLDEN", ""))


def loss_of(case, backend, t, **options):
    pair = dict(labels=case.labels, divergence=NAME, interpolation=t, backend=backend)
    return linear_divergence(*case.arguments[:4], temperature=case.temperature, **pair, **options)


def exact(case, t, kit):
    """The mean over kept rows and its gradients, in float64."""
    expected, leaves = kit.oracle(case.with_(interpolation=t))
    loss = expected[NAME].mean()
    return loss.item(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("t", [0.2, 0.4, 0.75, 1.0])
def test_released_values(t, backend, kit):
    """Loss and gradient of the authors' code, on logits; `kept` rows alone, and the mean over them."""
    if not (GOLDEN / "7_taid.npz").is_file():
        pytest.skip("MINILLM_GOLDEN has no 7_taid.npz")
    import numpy

    arrays = numpy.load(GOLDEN / "7_taid.npz")
    loss = json.loads((GOLDEN / "7_taid.json").read_text(encoding="utf-8"))["losses"][f"loss_t{t}"]
    student, teacher = (torch.from_numpy(arrays[f"{who}_logits"]).float() for who in ("student", "teacher"))
    eye, labels = torch.eye(student.shape[-1]), torch.from_numpy(arrays["labels"])
    student = student.to(kit.device).requires_grad_()
    heads = [LMHead(eye.to(kit.device))] * 2
    found = linear_divergence(
        student,
        heads[0],
        teacher.to(kit.device),
        heads[1],
        labels=labels.to(kit.device),
        divergence=NAME,
        interpolation=t,
        backend=backend,
    )
    found.backward()
    assert found.item() == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(
        student.grad.cpu().double(), torch.from_numpy(arrays[f"grad_t{t}"]), rtol=1e-5, atol=1e-8
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("t", [0.0, 1e-3, 0.4, 1.0])
def test_every_part_of_the_teacher(t, softcap, backend, kit):
    options = {"student_options": {"softcap": softcap, "logit_scale": 0.8}, "teacher_options": {"softcap": softcap}}
    case = kit.make_case(bias=True, temperature=0.7, **options)
    loss, expected = exact(case, t, kit)
    found = loss_of(case, backend, t)
    assert found.item() == pytest.approx(loss, rel=1e-6)
    if t == 0:  # the target is q
        assert all(gradient.abs().max() < 1e-6 for gradient in gradients(found, case).values())
        return
    # q - p_t, of which 1e-3 of the difference between the models is left, has three digits fewer than q
    assert_close(gradients(found, case), expected, 1e-5 if t > 0.1 else 1e-3, kit)


def test_the_ends_are_other_statistics(backend, kit):
    case = kit.make_case(ignored=0.0)
    fields = (NAME, "forward_kl", "teacher_entropy", "student_entropy")
    options = dict(fields=fields, backend=backend)
    low, high = (linear_token_stats(*case.arguments, interpolation=t, **options) for t in (0.0, 1.0))
    torch.testing.assert_close(getattr(low, NAME), low.student_entropy, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(getattr(high, NAME), high.forward_kl + high.teacher_entropy, rtol=1e-6, atol=1e-6)


def test_equal_models_have_no_gradient(backend, kit):
    case = kit.make_case(rows=20, noise=0.0, teacher_hidden=16, bias=True)
    same = case.student_hidden.detach(), case.student_weight.detach(), case.student_bias.detach()
    case = case.with_(teacher_hidden=same[0], teacher_weight=same[1], teacher_bias=same[2])
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(loss_of(case, backend, 0.4), case).values())


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_bans(t, who, backend, kit):
    """An id that one model bans has no weight in the target, unless that model has no part in it."""
    case = kit.make_case(rows=8, vocab=40, bias=True, ignored=0.0)
    if who != "teacher":
        case.student_bias.data[3] = -math.inf
    if who != "student":
        case.teacher_bias[3] = -math.inf
    found = linear_token_stats(*case.arguments, fields=(NAME,), interpolation=t, backend=backend)
    value = getattr(found, NAME)
    actual = gradients(value.sum(), case)
    if (t, who) == (1.0, "student"):  # the teacher's own distribution, of which the student cannot give an id
        assert (value == math.inf).all()
        assert not any(gradient.isnan().any() for gradient in actual.values())
        return
    expected, leaves = kit.oracle(case.with_(interpolation=t))
    torch.testing.assert_close(value.double(), expected[NAME], rtol=2e-6, atol=0)
    wanted = torch.autograd.grad(expected[NAME].sum(), list(leaves.values()))
    for name, gradient in zip(leaves, wanted, strict=True):
        torch.testing.assert_close(actual[name].double(), gradient, rtol=1e-4, atol=2e-6)
    if who != "teacher":
        assert (actual["weight"][3] == 0).all() and actual["bias"][3] == 0


def test_models_that_ban_each_others_ids_leave_no_target(backend, kit):
    case = kit.make_case(rows=3, vocab=6, bias=True, ignored=0.0)
    case.student_bias.data[:3], case.teacher_bias[3:] = -math.inf, -math.inf
    found = linear_token_stats(*case.arguments, fields=(NAME, "student_entropy"), interpolation=0.5, backend=backend)
    assert getattr(found, NAME).isnan().all() and found.student_entropy.isfinite().all()


@pytest.mark.parametrize("mask", [-300.0, -1e9, torch.finfo(torch.float32).min / 2])
@pytest.mark.parametrize("masked", ["student", "teacher", "both"])
def test_finite_masks_over_the_first_blocks(masked, mask, backend, kit):
    """More masked ids than four blocks hold: sums that begin there may overflow before they have any weight."""
    case = kit.make_case(rows=2, vocab=5000, bias=True, ignored=0.0)
    case.labels[:] = 4999
    if masked != "teacher":
        case.student_bias.data[:4900] += mask
    if masked != "student":
        case.teacher_bias[:4900] += mask
    loss, expected = exact(case, 0.4, kit)
    found = loss_of(case, backend, 0.4)
    assert found.item() == pytest.approx(loss, rel=1e-6)
    assert_close(gradients(found, case), expected, 1e-5, kit)


def test_an_objective_reads_it_beside_others(backend, kit):
    """TAID's loss mixed with a cross-entropy on the labels, from one pass."""
    case = kit.make_case(bias=True)

    def objective(stats):
        return 0.7 * stats.interpolated_cross_entropy - 0.3 * stats.student_logprob

    loss, _ = linear_objective(
        *case.arguments, objective, fields=(NAME, "student_logprob"), interpolation=0.4, backend=backend
    )
    expected, leaves = kit.oracle(case.with_(interpolation=0.4))
    loss64 = (0.7 * expected[NAME] - 0.3 * expected["student_logprob"]).sum()
    assert loss.item() == pytest.approx(loss64.item(), rel=1e-6)
    wanted = torch.autograd.grad(loss64, list(leaves.values()))
    assert_close(gradients(loss, case), dict(zip(leaves, wanted, strict=True)), 1e-5, kit)


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan, "0.4", True, None])
def test_its_option_is_a_part(wrong, kit):
    with pytest.raises(ValueError, match="interpolation must lie between 0"):
        loss_of(kit.make_case(rows=3), "torch", wrong)


def test_tiled_refuses_it(kit):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=f"backend='tiled' does not offer {NAME}"):
        loss_of(kit.make_case(rows=3), "tiled", 0.4)
