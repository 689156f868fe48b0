"""Means and deviations by hand."""

import math

import pytest

from minillm.evaluate.seeds import over_seeds, summary


def test_mean_and_sample_deviation():
    mean, deviation = over_seeds([1.0, 2.0, 6.0])
    assert mean == 3.0 and deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))


def test_what_has_no_deviation():
    assert over_seeds([]) == (None, None)
    assert over_seeds([2.0]) == (2.0, None)
    assert over_seeds([1.0, math.inf]) == (math.inf, None)


def test_a_summary_names_the_deviations_that_there_are():
    assert summary({"a": [1.0, 3.0], "b": [5.0], "c": []}) == {"a": 2.0, "a_std": pytest.approx(math.sqrt(2)), "b": 5.0}
