"""Values in messages, and the wording for a value of another type than was expected."""

import json
import math
from typing import Any


def show(value: Any) -> str:
    """A value as a message has it, cut where it is long."""
    is_plain = isinstance(value, str | float)
    try:
        text = repr(value) if is_plain else json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # Python does not write out whole numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def expected(what: str, given: Any) -> str:
    """The message for a value of another type than was expected, with the usual reason where there is one.

    Args:
        what: the type in words, as `shape.describe` has it.
        given: the value.
    """
    if what == "keys and values" and given is None:
        return "expected keys and values, not nothing; leave the group out to have its defaults"
    hint = ""
    if what == "text" and isinstance(given, int | float):
        hint = "; put it in quotes"
    elif what in ("a number", "a whole number") and isinstance(given, str) and _is_number(given):
        hint = " in quotes; leave the quotes out"
    return f"expected {what}, not {show(given)}{hint}"


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
