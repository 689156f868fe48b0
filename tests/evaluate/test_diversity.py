"""Distinct n-grams, counted by hand."""

import math

import pytest

from minillm.evaluate.diversity import distinct


@pytest.mark.parametrize(
    ("size", "share"),
    [(1, 100 * 3 / 7), (2, 100 * 3 / 5), (3, 100 * 3 / 3), (4, 100 * 1 / 1)],
)
def test_all_answers_together_and_none_across_two(size, share):
    # 1-grams 1 2 1 2 | 1 2 3; 2-grams 12 21 12 | 12 23; 3-grams 121 212 | 123; the 4-gram 1212
    assert distinct([[1, 2, 1, 2], [1, 2, 3]], size) == pytest.approx(share)


def test_answers_that_are_all_too_short():
    assert math.isnan(distinct([[1], [2, 3]], 3))
