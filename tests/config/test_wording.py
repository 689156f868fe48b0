"""Values in messages."""

import pytest

from minillm.config.wording import expected, show


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (None, "null"),
        ("a", "'a'"),
        (1e-8, "1e-08"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        ("x" * 200, "'" + "x" * 76 + "..."),
    ],
)
def test_a_value_is_shown_as_it_is_written_and_never_at_length(value, text):
    assert show(value) == text


def test_the_usual_reason_for_another_type():
    assert expected("text", 3) == "expected text, not 3; put it in quotes"
    assert expected("a number", "1e-4") == "expected a number, not '1e-4' in quotes; leave the quotes out"
    assert expected("keys and values", None).endswith("leave the group out to have its defaults")
    assert expected("a list", "x") == "expected a list, not 'x'"


def test_a_number_that_python_does_not_write_out():
    assert show(16**5_000) == "a number of thousands of digits"
