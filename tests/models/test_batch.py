"""Which position predicts what, whatever ids stand there."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minillm.models.batch import TokenSequence, collate, join_extras

EOS = 0
IDS = st.lists(st.integers(0, 3), max_size=6)  # few ids, EOS among them, so that they stand everywhere
SEQUENCES = st.lists(st.builds(TokenSequence, IDS.filter(bool), IDS), min_size=1, max_size=5)


def sequences(*pairs: tuple[list[int], list[int]]) -> list[TokenSequence]:
    return [TokenSequence(prompt, response) for prompt, response in pairs]


@given(SEQUENCES)
def test_every_response_token_is_predicted_from_what_is_before_it(sequences):
    batch = collate(sequences, EOS)
    width = batch.input_ids.shape[1]
    places = iter(zip(batch.rows.tolist(), batch.labels.tolist(), strict=True))
    for index, sequence in enumerate(sequences):
        for count, token in enumerate(sequence.response):
            row, label = next(places)
            before = sequence.prompt + sequence.response[:count]
            assert label == token and row // width == index
            assert batch.input_ids[index, : row % width + 1].tolist() == before
            assert batch.attention_mask[index, : row % width + 1].all()
    assert next(places, None) is None
    assert batch.lengths == tuple(len(sequence.response) for sequence in sequences)


@given(SEQUENCES)
def test_real_tokens_are_seen_and_padding_is_not(sequences):
    batch = collate(sequences, EOS)
    fed = [len(one.prompt) + max(len(one.response) - 1, 0) for one in sequences]
    assert batch.attention_mask.sum(1).tolist() == fed
    assert (batch.input_ids[batch.attention_mask == 0] == EOS).all()
    assert torch.equal(batch.position_ids, torch.arange(batch.input_ids.shape[1]).expand(len(sequences), -1))


def test_padding_with_eos_hides_no_eos():
    batch = collate(sequences(([5, 6], [7, EOS]), ([5], [EOS]), ([5, EOS, 6], [8, 9, EOS])), EOS)
    assert batch.input_ids.tolist() == [[5, 6, 7, 0, 0], [5, 0, 0, 0, 0], [5, 0, 6, 8, 9]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch.rows.tolist() == [1, 2, 5, 12, 13, 14]
    assert batch.labels.tolist() == [7, EOS, EOS, 8, 9, EOS]


def test_split_gives_each_sequence_its_rows():
    batch = collate(sequences(([5], [1, 2]), ([5], []), ([5, 6], [3])), EOS)
    assert [part.tolist() for part in batch.split(batch.labels)] == [[1, 2], [], [3]]


def test_to_moves_every_tensor():
    moved = collate([TokenSequence([5], [1], extras={"pixel_values": torch.zeros(1, 3)})], EOS).to("meta")
    names = ("input_ids", "attention_mask", "position_ids", "rows", "labels")
    assert {getattr(moved, name).device.type for name in names} == {"meta"} and moved.lengths == (1,)
    assert moved.extras["pixel_values"].device.type == "meta"


def test_an_empty_prompt_predicts_nothing():
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        collate(sequences(([5], [1]), ([], [1])), EOS)


def test_extras_lie_one_sequence_after_the_other():
    """Two pictures, none, and one of a sequence that has a size besides."""
    first, last, size = torch.randn(2, 3), torch.randn(1, 3), torch.tensor([[4, 3]])
    shown = [{"pixel_values": first}, {}, {"pixel_values": last, "sizes": size}]
    batch = collate([TokenSequence([5], [1], extras=extras) for extras in shown], EOS)
    assert batch.extras.keys() == {"pixel_values", "sizes"}
    assert torch.equal(batch.extras["pixel_values"], torch.cat([first, last])) and torch.equal(
        batch.extras["sizes"], size
    )
    assert join_extras([{}, {}]) == {}


def test_extras_of_other_sizes_are_padded_at_their_ends():
    """The tiles of a picture, or its height and width: what no picture fills is 0."""
    one, two = torch.ones(1, 2, 3), torch.full((2, 4, 2), 5.0)
    batch = collate([TokenSequence([1], [2], extras={"a": one}), TokenSequence([1], [2], extras={"a": two})], 0)
    joined = batch.extras["a"]
    assert joined.shape == (3, 4, 3)
    assert torch.equal(joined[:1, :2], one) and torch.equal(joined[1:, :, :2], two)
    assert joined.sum() == one.sum() + two.sum()


def test_the_prompt_is_what_comes_before_the_answer():
    sequences = [TokenSequence([1, 2, 3], [4, 5]), TokenSequence([1], [2, 3, 4, 5]), TokenSequence([1, 2], [])]
    assert collate(sequences, 0).prompt_mask().tolist() == [
        [True, True, True, False],
        [True, False, False, False],
        [True, True, False, False],
    ]


def test_a_teacher_with_prompts_of_its_own_reads_the_same_rows_after_them():
    told = [TokenSequence([5], [7, 8, EOS], teacher_prompt=[9, 9, 5]), TokenSequence([5, 6], [8])]
    batch = collate(told, 3)
    assert batch.input_ids.tolist() == [[5, 7, 8], [5, 6, 3]]  # of which the student sees nothing
    read = batch.read_by_teacher()
    assert read.input_ids.tolist() == [[9, 9, 5, 7, 8], [5, 6, 3, 3, 3]] and read.pad_id == 3
    assert torch.equal(read.labels, batch.labels) and read.lengths == batch.lengths
    assert read.rows.tolist() == [2, 3, 4, 6] and batch.rows.tolist() == [0, 1, 2, 4]
    assert read.read_by_teacher() is read
    untold = collate([replace(one, teacher_prompt=None) for one in told], 3)
    assert untold.read_by_teacher() is untold


def test_rows_of_prompts_are_not_those_of_another_prompt():
    batch = collate([TokenSequence([5, 6], [7], teacher_prompt=[9, 5, 6])], EOS)
    with pytest.raises(ValueError, match="rows of responses alone"):
        replace(batch, rows=torch.arange(2)).read_by_teacher()
