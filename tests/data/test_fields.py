"""Texts with {FIELD} in them."""

import pytest

from minillm.data.fields import field_names, fill
from minillm.data.sources import DataError


def test_fields_are_put_in_as_they_are():
    fields = {"a": "x{b}", "b": 3, "two words": 0.5, "c": None}
    assert fill("{a}-{b}-{two words}-{{a}}", fields, "f:1", "answer") == "x{b}-3-0.5-{a}"
    assert fill("no field", {}, "f:1", "answer") == "no field"
    assert fill("{a} {c}", fields, "f:1", "answer") is None
    assert field_names("{a}{{b}}{c d}") == ["a", "c d"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("{nothing}", "f:1: answer names the field nothing, and the record has a, b"),
        ("{label}", "data.prompts.parser"),
        ("{a}", "a: expected text or a number, found list"),
        ("{b}", "found bool"),
        ("{a.__class__}", r"names the field a.__class__"),
    ],
)
def test_what_cannot_be_put_in_is_named(text, message):
    with pytest.raises(DataError, match=message):
        fill(text, {"a": [1], "b": True}, "f:1", "answer")
