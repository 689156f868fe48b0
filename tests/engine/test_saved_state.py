"""A state that does not fit what it is read into is refused, with its place, before the next step fails on it."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from minillm import UserError
from minillm.engine.saved_state import check_optimizer_state, check_same_shapes, check_schedule_state


@pytest.fixture
def stepped() -> tuple[torch.optim.AdamW, LambdaLR]:
    """An optimiser of a (2, 3) matrix and a (2,) vector, after a step, and its schedule."""
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [layer.weight]}, {"params": [layer.bias], "weight_decay": 0.0}])
    scheduler = LambdaLR(optimizer, lambda step: 1.0)
    layer(torch.ones(3)).sum().backward()
    optimizer.step()
    scheduler.step()
    return optimizer, scheduler


def test_a_state_of_the_same_optimizer_fits(stepped):
    optimizer, scheduler = stepped
    check_optimizer_state(optimizer.state_dict(), optimizer)
    check_schedule_state(scheduler.state_dict(), scheduler)
    fresh = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups])
    check_optimizer_state(optimizer.state_dict(), fresh)
    check_optimizer_state(fresh.state_dict(), optimizer)  # of a stage without a step


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda state: state["state"][0].update(exp_avg=torch.zeros(3, 2)), r"exp_avg of weight 0 is \(3, 2\), the weight \(2, 3\)"),
        (lambda state: state["state"][1].update(exp_avg_sq=torch.zeros(1)), r"exp_avg_sq of weight 1 is \(1,\), the weight \(2,\)"),
        (lambda state: state["state"][1].update(exp_avg=0.0), r"exp_avg of weight 1 is no tensor \(float\)"),
        (lambda state: state["state"].update({2: {}}), "is of weight 2, and there are 2 weights"),
        (lambda state: state["param_groups"].pop(), r"groups are of \[1\] weights, this run's of \[1, 1\]"),
        (lambda state: state["param_groups"][0].update(params=[0, 1]), r"groups are of \[2, 1\] weights"),
    ],
)  # fmt: skip
def test_a_state_of_another_optimizer_is_refused(stepped, change, words):
    optimizer, _ = stepped
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises(UserError, match=words):
        check_optimizer_state(state, optimizer)


@pytest.mark.parametrize(
    "change, words",
    [({"last_epoch": "3"}, "last_epoch of the schedule is '3'"), ({"last_epoch": -1}, "is -1"), ({"base_lrs": [1e-3]}, "of 1 groups")],
)  # fmt: skip
def test_a_state_of_another_schedule_is_refused(stepped, change, words):
    _, scheduler = stepped
    with pytest.raises(UserError, match=words):
        check_schedule_state({**scheduler.state_dict(), **change}, scheduler)


OWN = {"step": 3, "flat": [torch.zeros(4), torch.zeros(2)], "state": {0: {"exp_avg": torch.zeros(4)}}}


def test_nested_states_of_the_same_shapes_agree_whatever_else_they_hold():
    check_same_shapes({**OWN, "step": 7, "more": torch.zeros(9)}, OWN, "optimizer")
    check_same_shapes({}, OWN, "optimizer")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"flat": [torch.zeros(4), torch.zeros(1)]}, r"optimizer\.flat\.1 is \(1,\), this run's \(2,\)"),
        ({"flat": (torch.zeros(4), torch.zeros(1))}, r"optimizer\.flat\.1 is \(1,\), this run's \(2,\)"),
        ({"flat": [torch.zeros(4)]}, r"optimizer\.flat has 1 parts, this run's 2"),
        (
            {"state": {0: {"exp_avg": None}}},
            r"optimizer\.state\.0\.exp_avg is no tensor \(NoneType\), this run's \(4,\)",
        ),
    ],
)
def test_nested_states_of_other_shapes_are_told_by_their_place(change, words):
    with pytest.raises(UserError, match=words):
        check_same_shapes({**OWN, **change}, OWN, "optimizer")
