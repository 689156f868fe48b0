"""The items of each rank: their split, and the teacher's rows that travel to the rank that trains on an answer."""

import pytest
import torch

from minillm.distributed import collectives
from minillm.rollout.buffer import Rollout, RolloutBuffer
from minillm.rollout.rank_items import rank_items

LENGTHS = (3, 1, 2, 4, 2, 5)  # all but two different: rows that go astray have another shape


def said(index: int) -> dict[str, torch.Tensor]:
    """What the teacher says of answer `index`: parts of two dtypes and shapes, as the k likeliest ids are."""
    numbers = torch.arange(LENGTHS[index] * 2).reshape(-1, 2) + 100 * index
    return {"ids": numbers.int(), "logprobs": -numbers.half(), "total": numbers[:, 0].double()}


def buffer_of(rank: int) -> RolloutBuffer:
    """The buffer as `score` leaves it on a rank: all answers, and the teacher's rows of those that it scored."""
    return RolloutBuffer(
        Rollout(index, [7], list(range(length)), False, {"advantage": torch.full((length,), float(index))},
                said(index) if collectives.owner(index) == rank else {})
        for index, length in enumerate(LENGTHS)
    )  # fmt: skip


def check(rollouts: list[Rollout], indices: list[int]) -> None:
    assert [rollout.key for rollout in rollouts] == indices
    for rollout in rollouts:
        assert rollout.teacher.keys() == said(rollout.key).keys()
        for name, expected in said(rollout.key).items():
            assert rollout.teacher[name].dtype == expected.dtype and torch.equal(rollout.teacher[name], expected)
        assert torch.equal(rollout.vectors["advantage"], torch.full((len(rollout.response),), float(rollout.key)))


@pytest.mark.parametrize(
    "chosen",
    [
        [4, 0, 3, 5],  # each rank trains on answers that both of them scored
        [0, 2, 1, 3],  # each on its own alone, and nothing is sent
        [1, 3, 0, 2],  # each on the other's alone
    ],
)
def test_rows_reach_the_rank_that_trains_on_them(chosen, in_ranks):
    found = in_ranks(2, lambda rank: rank_items(buffer_of(rank), chosen))
    check(found[0], chosen[:2])
    check(found[1], chosen[2:])


def test_the_buffer_of_a_rank_keeps_its_own_rows_alone(in_ranks):
    def after(rank: int) -> list[bool]:
        buffer = buffer_of(rank)
        rank_items(buffer, [1, 3, 0, 2])
        return [bool(rollout.teacher) for rollout in buffer]

    assert in_ranks(2, after) == [[True, False] * 3, [False, True] * 3]


def test_items_without_rows_are_split_in_order(in_ranks):
    assert in_ranks(3, lambda rank: rank_items("abcdef", [5, 0, 4, 1, 3, 2])) == [["f", "a"], ["e", "b"], ["d", "c"]]
    assert rank_items("abc", [2, 0]) == ["c", "a"]


def test_one_process_takes_rollouts_as_they_are():
    buffer = buffer_of(0)
    assert [a is b for a, b in zip(rank_items(buffer, [2, 0]), (buffer[2], buffer[0]), strict=True)] == [True, True]
