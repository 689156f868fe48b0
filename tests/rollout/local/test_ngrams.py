"""n-gram bans against transformers' processor, which looks at the whole sequence anew."""

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from minillm.rollout.local.ngrams import NgramBan


def bans(size: int, *prompts: list[int]) -> NgramBan:
    ban = NgramBan(size)
    ban.begin(range(len(prompts)), prompts)
    return ban


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_same_bans_as_transformers(size):
    generator = torch.Generator().manual_seed(size)
    vocabulary = {1: 40, 2: 4, 3: 4, 6: 2}[size]  # small enough to repeat n-grams
    sequences = torch.randint(vocabulary, (3, 60), generator=generator)
    ban, theirs = bans(size, *sequences[:, :8].tolist()), NoRepeatNGramLogitsProcessor(size)
    banned = 0
    for end in range(8, 60):
        logits = torch.randn(3, vocabulary, generator=generator)
        expected = theirs(sequences[:, :end], logits.clone())
        emptied = (expected == -torch.inf).all(-1)
        expected[emptied] = logits[emptied]
        assert torch.equal(ban.apply(range(3), logits), expected)
        banned += int((expected == -torch.inf).sum())
        ban.append(range(3), sequences[:, end].tolist())
    assert banned > 10


def test_a_row_that_would_lose_every_token_keeps_them():
    ban = bans(1, [0, 1, 2], [0])
    logits = torch.tensor([[1.0, 2.0, 3.0, -torch.inf], [1.0, 2.0, 3.0, 4.0]])
    expected = torch.tensor([[1.0, 2.0, 3.0, -torch.inf], [-torch.inf, 2.0, 3.0, 4.0]])
    assert torch.equal(ban.apply([0, 1], logits), expected)


def test_shorter_than_an_ngram():
    logits = torch.randn(1, 5)
    assert torch.equal(bans(4, [1, 1]).apply([0], logits.clone()), logits)


def test_rows_with_other_prompts():
    """They know nothing of what was there, and the rows beside them go on."""
    ban = bans(2, [1, 2, 1], [3, 4, 3], [0, 0, 1])
    ban.begin([1], [[2, 3, 2]])
    ban.append([2, 1], [0, 2])
    assert ban.apply([2, 1], torch.zeros(2, 5)).isinf().nonzero().tolist() == [[0, 0], [0, 1], [1, 2], [1, 3]]
