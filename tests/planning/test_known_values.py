"""Numbers among fake tensors keep their values, and what comes of weights and pixels has none."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from minillm.planning import known_values
from minillm.planning.known_values import KnownValues
from minillm.planning.ledger import Ledger


@pytest.fixture
def ledger():
    """Active with the modes of a plan that shows pictures."""
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger, KnownValues():
        yield ledger


def test_numbers_are_computed_and_can_be_asked_for(ledger):
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    assert (grid[:, 1] * grid[:, 2]).cumsum(0).tolist() == [24, 28]
    assert torch.linspace(0, 3, 4).int().tolist() == [0, 1, 2, 3]
    assert torch.nonzero(grid == 2).tolist() == [[1, 1], [1, 2]]
    assert not isinstance(grid, FakeTensor)


def test_what_meets_weights_or_pixels_has_no_values(ledger):
    pixels = torch.empty(2, 3)
    assert isinstance(pixels, FakeTensor) and isinstance(pixels * torch.arange(3), FakeTensor)
    with pytest.raises(DataDependentOutputException):
        bool((pixels > 0).any())


def test_a_mask_picks_as_many_elements_as_it_is_true_for(ledger):
    states, mask = torch.empty(2, 3, 8), torch.tensor([[True, False, True], [False, False, True]])
    assert states[mask].shape == (3, 8) and states[:, mask[0]].shape == (2, 2, 8)
    assert states[mask[..., None].expand_as(states)].shape == (24,)
    states[mask] = torch.empty(3, 8)
    weight = torch.empty(4, 8, requires_grad=True)
    weight[torch.tensor([True, False, True, True])].sum().backward()
    assert weight.grad.shape == (4, 8)


def test_no_pixel_is_equal_to_a_number(ledger):
    tiles = torch.empty(3, 5)
    assert ((tiles == 0.0).sum(-1) != 5).tolist() == [True] * 3  # which tiles are not padding


def test_what_is_written_into_numbers_from_elsewhere_leaves_them(ledger):
    places = torch.zeros(3, dtype=torch.int64)
    places.copy_(torch.empty(3))
    assert places.tolist() == [0, 0, 0]


def test_what_is_too_large_has_no_values(ledger, monkeypatch):
    monkeypatch.setattr(known_values, "MOST", 15)
    row = torch.arange(4)
    assert isinstance(row[:, None] <= row, FakeTensor) and not isinstance(row[:, None] <= row[:3], FakeTensor)


def test_both_kinds_are_counted(ledger):
    before = ledger.total
    numbers, pixels = torch.arange(10), torch.empty(100)
    assert ledger.total - before == 80 + 400
    del numbers, pixels
    assert ledger.total == before
