"""Drawing by the inverse CDF: exact against probabilities written out in float64."""

import pytest
import torch
from torch import Tensor

from minillm.rollout.local.distribution import BLOCK, Component, draw_tokens, likeliest_tokens, padded_size, process

VOCABULARY = 3 * BLOCK - 50


def make_logits(rows: int, *, seed: int = 0, banned: tuple[int, ...] = ()) -> Tensor:
    torch.manual_seed(seed)
    logits = torch.full((rows, padded_size(VOCABULARY)), -torch.inf)
    logits[:, :VOCABULARY] = 3 * torch.randn(rows, VOCABULARY)
    logits[:, list(banned)] = -torch.inf
    return logits


def mixture(parts: list[tuple[Tensor, float]]) -> Tensor:
    return sum(share * logits.double().softmax(-1) for logits, share in parts)


def components(parts: list[tuple[Tensor, float]]) -> list[Component]:
    return [Component(logits.clone(), share) for logits, share in parts]


@pytest.mark.parametrize("shares", [(1.0,), (0.8, 0.2), (0.5, 0.5)])
def test_every_token_gets_its_share_of_the_unit_interval(shares):
    parts = [(make_logits(1, seed=place), share) for place, share in enumerate(shares)]
    points = 40_000
    uniform = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    spread = [(logits.expand(points // 10, -1), share) for logits, share in parts]
    drawn = [draw_tokens(components(spread), some) for some in uniform.split(points // 10)]
    tokens, logprobs = (torch.cat(values) for values in zip(*drawn, strict=True))
    expected = mixture(parts)[0]
    counts = tokens.bincount(minlength=len(expected)).double()
    # an interval of length p holds p * points evenly spaced points, give or take one (and the rounding of fp32)
    assert ((counts - points * expected).abs() < 1.5).all()
    assert (tokens.diff() >= 0).all(), "the inverse of a CDF is monotonic"
    torch.testing.assert_close(logprobs, expected[tokens].log(), atol=2e-6, rtol=0)


def test_what_has_no_probability_is_never_drawn():
    allowed = [BLOCK - 1, BLOCK, 2 * BLOCK + 3]  # the ends of blocks; the ends of the vocabulary are banned
    banned = tuple(set(range(VOCABULARY)) - set(allowed))
    logits = make_logits(4, banned=banned)
    logits[3, allowed[1:]] = -200.0  # a weight that underflows fp32
    extremes = torch.tensor([2.0**-53, 1 - 2.0**-53, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = draw_tokens([Component(logits, 1.0)], extremes)
    assert tokens[0] == allowed[0] and tokens[1] == allowed[2] and tokens[2] in allowed and tokens[3] == allowed[0]
    assert logprobs.isfinite().all()


def test_a_token_that_only_one_model_knows():
    student, teacher = make_logits(1, banned=(5,)), make_logits(1, seed=1)
    teacher[:, 5] = 50.0  # all of the teacher's probability
    tokens, logprobs = draw_tokens(
        components([(student.expand(1000, -1), 0.75), (teacher.expand(1000, -1), 0.25)]),
        (torch.arange(1000).double() + 0.5) / 1000,
    )
    hit = tokens == 5
    assert hit.sum() == 250
    torch.testing.assert_close(logprobs[hit].exp(), torch.full((250,), 0.25, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature, top_k, top_p", [(0.7, 0, 1.0), (1.0, 7, 1.0), (1.0, 0, 0.6), (1.3, 40, 0.9)])
def test_truncated_distributions(temperature, top_k, top_p):
    logits = make_logits(3)
    processed = process(logits.clone(), temperature=temperature, top_k=top_k, top_p=top_p).softmax(-1)
    for row, got in zip(logits, processed, strict=True):
        probabilities, order = (row.double() / temperature).softmax(-1).sort(descending=True)
        kept = torch.arange(len(row)) < (top_k or len(row))
        probabilities = torch.where(kept, probabilities, 0.0)
        probabilities = probabilities / probabilities.sum()
        before = probabilities.cumsum(-1) - probabilities  # the smallest set that reaches top_p
        probabilities = torch.where(before < top_p, probabilities, 0.0)
        expected = torch.zeros_like(probabilities).scatter(0, order, probabilities / probabilities.sum())
        torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=0)


def test_truncation_comes_before_mixing():
    student, teacher = make_logits(1), make_logits(1, seed=1)
    both = [process(one.clone(), temperature=1.0, top_k=1, top_p=1.0) for one in (student, teacher)]
    assert student.argmax() != teacher.argmax()
    uniform = (torch.arange(100).double() + 0.5) / 100
    tokens, _ = draw_tokens([Component(one.repeat(100, 1), 0.5) for one in both], uniform)
    assert sorted(set(tokens.tolist())) == sorted({int(student.argmax()), int(teacher.argmax())})


def test_likeliest():
    student, teacher = make_logits(6), make_logits(6, seed=1)
    tokens, logprobs = likeliest_tokens([student.clone()], [1.0])
    assert torch.equal(tokens, student.argmax(-1))
    torch.testing.assert_close(logprobs, student.double().log_softmax(-1).amax(-1), atol=1e-6, rtol=0)
    tokens, logprobs = likeliest_tokens([student.clone(), teacher.clone()], [0.4, 0.6])
    expected = mixture([(student, 0.4), (teacher, 0.6)])
    assert torch.equal(tokens, expected.argmax(-1))
    torch.testing.assert_close(logprobs, expected.amax(-1).log(), atol=1e-6, rtol=0)


def test_likeliest_sees_what_exp_would_round_away():
    logits = torch.zeros(1, BLOCK)
    logits[0, 3], logits[0, 9] = 8.0, 8.0 + 1e-6
    assert logits[0, 9] > logits[0, 3] and likeliest_tokens([logits], [1.0])[0].item() == 9


def test_not_a_number_stays_visible():
    logits = make_logits(2)
    logits[1, 17] = torch.nan
    tokens, logprobs = draw_tokens([Component(logits, 1.0)], torch.tensor([0.5, 0.5], dtype=torch.float64))
    assert logprobs[0].isfinite() and logprobs[1].isnan() and 0 <= tokens[1] < padded_size(VOCABULARY)
