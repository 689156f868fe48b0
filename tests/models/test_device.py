"""Devices by their names, and copies between them that nobody reads too early."""

import pytest
import torch

from minillm import UserError
from minillm.models.device import moved, pick_device, same_device


@pytest.mark.parametrize(
    "one, other, same",
    [("cuda", "cuda:0", True), ("cuda:1", "cuda:1", True), ("cuda", "cuda:1", False), ("cpu", "cuda", False)],
)
def test_two_names_of_one_device(one, other, same):
    assert same_device(torch.device(one), torch.device(other)) is same_device(torch.device(other), torch.device(one))
    assert same_device(torch.device(one), torch.device(other)) is same


def test_a_device_that_is_not_there_is_named_by_its_key(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match="teacher.device is 'cuda:1', but torch sees no GPU here; use teacher.device=cpu"
    ):
        pick_device("cuda:1", "teacher.device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="teachers.a.device is 'cuda:1', but torch sees 1 GPUs here"):
        pick_device("cuda:1", "teachers.a.device")


@pytest.mark.parametrize("device, waits", [("cpu", True), (torch.device("cpu"), True), ("cuda:1", False)])
def test_the_host_waits_for_what_comes_to_it_and_for_nothing_else(device, waits):
    class Recorded:
        def to(self, device, non_blocking):
            return device, non_blocking

    assert moved(Recorded(), device) == (device, not waits)
