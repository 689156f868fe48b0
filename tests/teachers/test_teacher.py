"""Rows as a buffer and the losses take them, and what is said where a source cannot do what is asked."""

from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch

from minillm import UserError
from minillm.teachers.teacher import ABILITIES, HiddenRows, TopKRows, require_ability, require_teacher

Pair = namedtuple("Pair", ("ids", "logprobs"))  # as minillm.losses.TopK has them


def test_hidden_rows_are_hidden_states_and_whose_they_are():
    source = object()
    rows = HiddenRows(torch.randn(5, 3), source)
    assert len(rows) == 5 and rows.parts().keys() == {"hidden"} and rows.parts()["hidden"] is rows.hidden
    moved = rows.to("meta")
    assert moved.hidden.device.type == "meta" and moved.source is source and rows.hidden.device.type == "cpu"


def test_likeliest_ids_go_to_the_losses_without_a_head():
    rows = TopKRows(Pair(torch.tensor([[3, 1], [2, 0]]), torch.tensor([[-0.1, -3.0], [-0.5, -1.5]])))
    assert len(rows) == 2 and rows.parts() == {"ids": rows.top_k.ids, "logprobs": rows.top_k.logprobs}
    with rows.for_losses() as (said, head):
        assert said is rows.top_k and head is None
    moved = rows.to("meta").top_k
    assert isinstance(moved, Pair) and {moved.ids.device.type, moved.logprobs.device.type} == {"meta"}


def test_a_teacher_that_is_not_there():
    with pytest.raises(UserError, match="scoring answers needs a teacher, and there is none; configure `teacher`"):
        require_teacher(None, "scoring answers")
    with pytest.raises(UserError, match="sampling needs a teacher, and there is none"):
        require_ability(None, "sample", "sampling")


@pytest.mark.parametrize("ability", ABILITIES)
def test_a_teacher_without_an_ability_is_named(ability):
    able = SimpleNamespace(abilities=frozenset({ability}))
    require_teacher(able, "this")
    require_ability(able, ability, "this")
    unable = SimpleNamespace(abilities=frozenset(set(ABILITIES) - {ability}))
    with pytest.raises(UserError, match=f"this needs a teacher that can {ABILITIES[ability]}, which SimpleNamespace"):
        require_ability(unable, ability, "this")
