"""linear_sorted_distance against sorted full probabilities in float64, and what top_k may leave out."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kernels.head import LMHead
from minillm.kernels.sorted_distance import linear_sorted_distance, sorted_distance

GOLDEN = Path(os.environ.get("MINILLM_GOLDEN", ""))


def pair(n=7, v_s=23, v_t=31, *, seed=0, dtype=torch.float64, bias=False, scale=1.0, softcap=None):
    """Hidden states and heads of both models; the student's require a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul(1.5).to(dtype)

    weight = random(v_s, 5).requires_grad_()
    head = LMHead(weight, random(v_s).requires_grad_() if bias else None, scale, softcap)
    return random(n, 5).requires_grad_(), head, random(n, 4), LMHead(random(v_t, 4), None, 1.0, softcap)


def full_probabilities(hidden, head):
    z = head.logit_scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    return torch.softmax(z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap), -1)


def oracle(student_hidden, student_head, teacher_hidden, teacher_head):
    """The sum of |sort(p) - sort(q)|, the shorter one filled up with zeros, differentiated through torch's own sort."""
    q = full_probabilities(student_hidden, student_head).sort(-1, descending=True).values
    p = full_probabilities(teacher_hidden, teacher_head).detach().sort(-1, descending=True).values
    size = max(q.shape[1], p.shape[1])
    q, p = (torch.nn.functional.pad(one, (0, size - one.shape[1])) for one in (q, p))
    return (p - q).abs().sum()


def leaves(hidden, head):
    return [one for one in (hidden, head.weight, head.bias) if one is not None]


# either vocabulary the larger, equal ones, one row, a single id
@pytest.mark.parametrize(("n", "v_s", "v_t"), [(7, 23, 31), (7, 31, 23), (5, 16, 16), (1, 9, 40), (3, 1, 4)])
@pytest.mark.parametrize(
    "extras", [{}, {"bias": True, "scale": 0.3, "softcap": 2.5}], ids=["plain", "bias_and_softcap"]
)
@pytest.mark.parametrize("chunk_bytes", [None, 1], ids=["one_chunk", "a_row_at_a_time"])
def test_value_and_gradient_are_those_of_full_probabilities(n, v_s, v_t, extras, chunk_bytes):
    inputs = pair(n, v_s, v_t, **extras)
    loss, slack = linear_sorted_distance(*inputs, chunk_bytes=chunk_bytes)
    want = oracle(*inputs)
    assert loss.item() == pytest.approx(want.item(), rel=1e-12) and slack.item() == 0
    found, wanted = (torch.autograd.grad(3.0 * one, leaves(*inputs[:2])) for one in (loss, want))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_fp32_is_the_float64_value_to_rounding():
    inputs = pair(n=40, v_s=300, v_t=500, dtype=torch.float32)
    wide = pair(n=40, v_s=300, v_t=500)
    loss, _ = linear_sorted_distance(*inputs)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(oracle(*wide).item(), rel=1e-5)
    found = torch.autograd.grad(loss, leaves(*inputs[:2]))
    for ours, theirs in zip(found, torch.autograd.grad(oracle(*wide), leaves(*wide[:2])), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-4)


def test_the_reference_values():
    if not (GOLDEN / "7_uld.json").is_file():
        pytest.skip("MINILLM_GOLDEN has no 7_uld.json")
    said = json.loads((GOLDEN / "7_uld.json").read_text(encoding="utf-8"))
    arrays = {name: torch.from_numpy(one) for name, one in np.load(GOLDEN / "7_uld.npz").items()}
    z_s, z_t = (
        arrays["student_logits"].requires_grad_(),
        arrays["teacher_logits"][: said["arrays"]["student_logits"][0][0]],
    )
    # an identity as the head makes hidden states logits
    loss, _ = linear_sorted_distance(
        z_s, LMHead(torch.eye(z_s.shape[1]).double()), z_t, LMHead(torch.eye(z_t.shape[1]).double())
    )
    assert loss.item() == pytest.approx(said["sum"], rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, z_s)[0], arrays["grad_of_sum"], rtol=1e-9, atol=1e-12)
    rows = sorted_distance(torch.softmax(z_s.detach(), 1), torch.softmax(z_t, 1))[0]
    torch.testing.assert_close(rows, torch.tensor(said["per_position"], dtype=torch.float64), rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    v_s=st.integers(1, 40),
    v_t=st.integers(1, 40),
    k=st.integers(1, 45),
    seed=st.integers(0, 99),
    sharp=st.floats(0.1, 30),
)
def test_top_k_is_below_the_exact_value_by_at_most_its_slack(v_s, v_t, k, seed, sharp):
    generator = torch.Generator().manual_seed(seed)
    q, p = (torch.softmax(sharp * torch.randn(4, size, generator=generator).double(), 1) for size in (v_s, v_t))
    exact, none, _ = sorted_distance(q, p)
    near, slack, _ = sorted_distance(q, p, k)
    assert (none == 0).all() and (slack >= 0).all()
    assert (near <= exact + 1e-12).all() and (exact <= near + slack + 1e-12).all()
    if k >= min(v_s, v_t):
        assert torch.equal(near, exact)


def test_the_gradient_of_top_k_is_that_of_its_value():
    inputs = pair()
    loss, slack = linear_sorted_distance(*inputs, top_k=4, chunk_bytes=2000)
    q, p = full_probabilities(*inputs[:2]), full_probabilities(*inputs[2:]).detach()
    ours, theirs = (one.sort(-1, descending=True).values for one in (q, p))
    rest, their_rest = ours[:, 4:].sum(1), theirs[:, 4:].sum(1)
    want = (ours[:, :4] - theirs[:, :4]).abs().sum() + (rest - their_rest).abs().sum()
    assert loss.item() == pytest.approx(want.item(), rel=1e-12) and want.item() < oracle(*inputs).item()
    assert slack.item() == pytest.approx(2 * torch.minimum(rest, their_rest).sum().item(), rel=1e-9)
    for one, other in zip(*(torch.autograd.grad(one, leaves(*inputs[:2])) for one in (loss, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_equal_models_are_at_no_distance_whatever_their_ids_are_called():
    hidden, head, _, _ = pair()
    shuffled = LMHead(head.weight.detach()[torch.randperm(23, generator=torch.Generator().manual_seed(1))])
    loss, _ = linear_sorted_distance(hidden, head, hidden.detach(), shuffled)
    assert loss.item() < 1e-12


def test_banned_ids_and_no_rows_at_all():
    hidden, head, teacher_hidden, teacher_head = pair(bias=True)
    with torch.no_grad():
        head.bias[3] = -torch.inf
    loss, _ = linear_sorted_distance(hidden, head, teacher_hidden, teacher_head)
    gradients = torch.autograd.grad(loss, leaves(hidden, head))
    assert loss.isfinite() and all(one.isfinite().all() for one in gradients) and gradients[2][3] == 0
    nothing, _ = linear_sorted_distance(hidden[:0], head, teacher_hidden[:0], teacher_head)
    assert nothing.item() == 0 and torch.autograd.grad(nothing, head.weight)[0].abs().max() == 0


def test_wrong_arguments_are_named():
    hidden, head, teacher_hidden, teacher_head = pair()
    with pytest.raises(ValueError, match="teacher_hidden has 6 rows, student_hidden 7"):
        linear_sorted_distance(hidden, head, teacher_hidden[:6], teacher_head)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        linear_sorted_distance(hidden, head, teacher_hidden, teacher_head, top_k=0)
    with pytest.raises(ValueError, match="teacher_head"):
        linear_sorted_distance(hidden, head, teacher_hidden, head)
