"""Accuracy and expected calibration error against numbers done by hand."""

import pytest
import torch

from minillm.evaluate.calibration import calibration


def logs(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def test_against_a_hand_computed_table():
    # confidences 0.95 right, 0.95 wrong, 0.65 right, 0.65 right; what lies beside the words does not count
    found = calibration(logs((0.95, 0.05), (0.095, 0.005), (0.35, 0.65), (0.13, 0.07)), torch.tensor([0, 1, 1, 0]))
    assert found.accuracy == 75.0
    assert found.counts == [0, 0, 0, 0, 0, 0, 2, 0, 0, 2]
    assert found.confidence[6] == pytest.approx(0.65) and found.correct[6] == 1.0
    assert found.confidence[9] == pytest.approx(0.95) and found.correct[9] == 0.5
    assert found.ece == pytest.approx(0.5 * abs(1.0 - 0.65) + 0.5 * abs(0.5 - 0.95))
    assert found.confidence[0] is None and found.correct[0] is None


def test_a_bin_holds_its_upper_edge_and_certainty_is_in_the_last():
    found = calibration(logs((0.5, 0.5), (1.0, 1e-300)), torch.tensor([0, 0]), bins=2)
    assert found.counts == [1, 1] and found.ece == pytest.approx(0.25)


def test_without_examples():
    with pytest.raises(ValueError, match="no examples"):
        calibration(torch.empty(0, 2), torch.empty(0, dtype=torch.int64))
