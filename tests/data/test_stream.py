"""Every item once a pass, the same for any number of ranks, resumable at any place."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.data.stream import RankSlice, Stream

SIZES = st.integers(1, 12)


@given(st.integers(1, 20), st.integers(0, 5), st.integers(1, 7))
def test_every_item_once_a_pass(items, seed, n):
    stream = Stream(range(items), seed=seed)
    taken = [item for _ in range(3 * items) for item in stream.take(n)]
    for start in range(0, len(taken) - items + 1, items):
        assert Counter(taken[start : start + items]) == Counter(range(items))
    assert stream.passes == 3 * n


def test_passes_and_seeds_differ():
    stream = Stream(range(50), seed=1)
    first, second = stream.take(50), stream.take(50)
    assert first != second and first != sorted(first)
    assert Stream(range(50), seed=2).take(50) != first
    assert Stream(range(50), seed=1).take(50) == first


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4))
def test_the_union_of_all_ranks_does_not_depend_on_their_number(items, n, ranks):
    alone = Stream(range(items), seed=3)
    streams = [Stream(range(items), seed=3) for _ in range(ranks)]
    for _ in range(4):
        dealt = [item for rank, stream in enumerate(streams) for item in stream.take(n, rank, ranks)]
        assert dealt == alone.take(n * ranks)
    assert {stream.passes for stream in streams} == {alone.passes}


@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 4))
def test_what_is_taken_together_is_numbered_and_the_same_on_every_rank(items, n, ranks):
    data = [f"item {place}" for place in range(items)]
    alone, slices = (
        Stream(data, seed=3),
        [RankSlice(Stream(data, seed=3), rank=r, world_size=ranks) for r in range(ranks)],
    )
    for _ in range(3):
        taken = alone.take(n)
        for numbered in (one.take_numbered(n) for one in slices):
            assert [item for _, item in numbered] == taken == [data[place] for place, _ in numbered]
    assert {one.passes for one in slices} == {alone.passes}


@given(st.integers(1, 20), st.lists(SIZES, max_size=5), st.lists(SIZES, min_size=1, max_size=5))
def test_a_resumed_stream_goes_on(items, before, after):
    whole = Stream(range(items), seed=4)
    for n in before:
        whole.take(n)
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = Stream(range(items), seed=4)
    resumed.load_state_dict(state)
    assert [resumed.take(n) for n in after] == [whole.take(n) for n in after]


def test_a_pass_that_ended_can_be_gone_back_to():
    """A checkpoint may be loaded into a stream that is already in a later pass."""
    stream = Stream(range(6), seed=4)
    state, first = stream.state_dict(), stream.take(6)
    stream.take(9)
    stream.load_state_dict(state)
    assert stream.take(6) == first


def test_other_data_is_noticed():
    state = Stream(range(6), seed=4).state_dict()
    with pytest.raises(ValueError, match="made with 6 records, but the data now has 7"):
        Stream(range(7), seed=4).load_state_dict(state)


def test_nothing_to_take():
    with pytest.raises(ValueError, match="nothing to train on"):
        Stream([], seed=0)
