"""Logits that are standardised row by row, against float64: deviations, and the gradient through them."""

import pytest
import torch

from minillm import UserError
from minillm.losses import LMHead
from minillm.methods.standardized import standardized_divergence
from minillm.models.standardized_logits import deviations


def standardized(logits: torch.Tensor) -> torch.Tensor:  # (N, V), -inf at ids that are none
    """Less the mean of each row, over its standard deviation."""
    counted = logits.isfinite()
    values = logits[counted].view(len(logits), -1)
    result = torch.full_like(logits, -torch.inf)
    result[counted] = ((values - values.mean(-1, keepdim=True)) / (values.std(-1, keepdim=True) + 1e-7)).flatten()
    return result


@pytest.mark.parametrize("banned", [False, True])
def test_the_head_has_the_gradient_through_the_deviations(banned):
    """Of heads that scale their logits, of vocabularies of two sizes, with an id that has no probability, in float64."""
    generator = torch.Generator().manual_seed(0)
    h, w, h_t, w_t, weights = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((5, 4), (9, 4), (5, 3), (12, 3), (5,))
    )
    answers, bias = torch.tensor([True, False, True, True, False]), None
    if banned:
        bias = torch.zeros(9, dtype=torch.float64).index_fill(0, torch.tensor([2]), -torch.inf)
    given = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    other = None if bias is None else torch.cat([bias, bias.new_zeros(3)])
    total, metrics = standardized_divergence(
        given[0], LMHead(given[1], bias, logit_scale=0.3), h_t, LMHead(w_t, other), weights=weights, answers=answers,
        divergence="jsd", vocab_size=9, options={"beta": 0.3},
    )  # fmt: skip
    wanted = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    kept = [one for one in range(9) if bias is None or one != 2]
    logits = 0.3 * wanted[0] @ wanted[1][kept].T, h_t @ w_t[kept].T
    q, p = (standardized(one).softmax(-1) for one in logits)
    m = 0.3 * p + 0.7 * q
    rows = (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum(-1)
    want = (weights * rows).sum()
    assert total.item() == pytest.approx(want.item(), rel=1e-9)
    assert metrics["standardized_jsd_nats"].item() == pytest.approx(rows[answers].sum().item(), rel=1e-9)
    gradients = torch.autograd.grad(2 * total, given), torch.autograd.grad(2 * want, wanted)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)  # none for the id that is banned


@pytest.mark.parametrize("head", [{"softcap": 3.0}, {"bias": torch.ones(9)}])
def test_heads_that_bend_or_shift_their_logits_are_refused(head):
    with pytest.raises(
        UserError, match="method.standardize: logits are standardised of heads without softcap and bias"
    ):
        deviations(torch.ones(2, 4), LMHead(torch.ones(9, 4), **head), 9)


@pytest.mark.parametrize("where", ["in all rows of the head", "in the hidden states too"])
def test_an_offset_that_all_logits_share_costs_the_deviations_nothing(where):
    """Logits of 1e4 that differ by about 1: their squares need 8 digits more than fp32 has."""
    generator = torch.Generator().manual_seed(0)
    h, w, direction = (torch.randn(shape, generator=generator) for shape in ((6, 16), (40, 16), (16,)))
    unit, w = direction / direction.norm(), w / 4
    h = h - (h @ unit)[:, None] * unit  # what they have along it is the offset
    many, along = (1e4, 1.0) if where == "in all rows of the head" else (100.0, 100.0)
    h, w = h + along * unit, w + many * unit
    given = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    found = deviations(given[0], LMHead(given[1], logit_scale=0.5), 40)
    wanted = [one.double().requires_grad_() for one in (h, w)]
    logits = 0.5 * wanted[0] @ wanted[1].T
    assert logits.mean().item() == pytest.approx(5e3, rel=1e-2)
    want = logits.std(-1)
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=0.0)
    gradients = torch.autograd.grad(found.sum(), given), torch.autograd.grad(want.sum(), wanted)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
