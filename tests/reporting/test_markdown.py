"""Numbers, durations and texts as the report prints them."""

import pytest

from minillm.reporting.markdown import MISSING, cell, duration, number, percentage, table, with_deviation


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.41237, "0.412"),
        (23.06, "23.1"),
        (1234567.0, "1,234,567"),
        (-1.5, "-1.50"),
        (0.0, "0"),
        (0.00123, "0.00123"),
        (0.0000123, "1.23e-05"),
        (float("inf"), "∞"),
        (float("-inf"), "-∞"),
        (float("nan"), "nan"),
        (None, MISSING),
    ],
)
def test_number(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.012, "0.0120 s"), (8.314, "8.31 s"), (59.999, "1 min 00 s"), (312, "5 min 12 s"), (7501, "2 h 05 min")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_deviation_and_share():
    assert with_deviation(23.06, 0.4321) == "23.1 ± 0.43"
    assert with_deviation(23.06, None) == with_deviation(23.06, 0.0) == "23.1"
    assert [percentage(value) for value in (0.0, 1.0, 0.975, None)] == ["0%", "100%", "97.5%", MISSING]


def test_a_column_in_which_all_is_missing_goes():
    assert table(["", "a", "b"], [["x", MISSING, "1"], ["y", MISSING, MISSING]]).splitlines() == [
        "|  | b |",
        "| --- | ---: |",
        "| x | 1 |",
        "| y | – |",
    ]


def test_nothing_in_a_cell_is_markup():
    assert cell(" a | b\n*c* <d> snake_case _e_ ") == r"a \| b<br>\*c\* \<d> snake_case \_e\_"
    assert cell("  \n") == "*(empty)*"
    assert cell("abcdef", limit=3) == "abc …"
