"""Which position predicts what, whatever ids stand there."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.models.batch import collate

EOS = 0
IDS = st.lists(st.integers(0, 3), max_size=6)  # few ids, EOS among them, so that they stand everywhere
PAIRS = st.lists(st.tuples(IDS.filter(bool), IDS), min_size=1, max_size=5)


@given(PAIRS)
def test_every_response_token_is_predicted_from_what_is_before_it(pairs):
    batch = collate(pairs, EOS)
    width = batch.input_ids.shape[1]
    places = iter(zip(batch.rows.tolist(), batch.labels.tolist(), strict=True))
    for index, (prompt, response) in enumerate(pairs):
        for count, token in enumerate(response):
            row, label = next(places)
            before = prompt + response[:count]
            assert label == token and row // width == index
            assert batch.input_ids[index, : row % width + 1].tolist() == before
            assert batch.attention_mask[index, : row % width + 1].all()
    assert next(places, None) is None
    assert batch.lengths == tuple(len(response) for _, response in pairs)


@given(PAIRS)
def test_real_tokens_are_seen_and_padding_is_not(pairs):
    batch = collate(pairs, EOS)
    assert batch.attention_mask.sum(1).tolist() == [len(prompt) + max(len(answer) - 1, 0) for prompt, answer in pairs]
    assert (batch.input_ids[batch.attention_mask == 0] == EOS).all()
    assert torch.equal(batch.position_ids, torch.arange(batch.input_ids.shape[1]).expand(len(pairs), -1))


def test_padding_with_eos_hides_no_eos():
    batch = collate([([5, 6], [7, EOS]), ([5], [EOS]), ([5, EOS, 6], [8, 9, EOS])], EOS)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [5, 0, 0, 0, 0], [5, 0, 6, 8, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.rows.tolist() == [1, 2, 5, 12, 13, 14]
    assert batch.labels.tolist() == [7, EOS, EOS, 8, 9, EOS]


def test_split_gives_each_sequence_its_rows():
    batch = collate([([5], [1, 2]), ([5], []), ([5, 6], [3])], EOS)
    assert [part.tolist() for part in batch.split(batch.labels)] == [[1, 2], [], [3]]


def test_to_moves_every_tensor():
    moved = collate([([5], [1])], EOS).to("meta")
    names = ("input_ids", "attention_mask", "position_ids", "rows", "labels")
    assert {getattr(moved, name).device.type for name in names} == {"meta"} and moved.lengths == (1,)


def test_an_empty_prompt_predicts_nothing():
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        collate([([5], [1]), ([], [1])], EOS)
