"""Texts with {FIELD} in them, filled from the fields of a record."""

from collections.abc import Mapping
from typing import Any

from minillm.config.data import FIELD_PART, field_names
from minillm.data.sources import DataError

PARSED = ("rationale", "label")  # fields that a parser of references adds


def fill(text: str, fields: Mapping[str, Any], where: str, key: str) -> str | None:
    """The text with the values of its fields; None where one of them is null.

    Args:
        text: with {FIELD} in it; {{ and }} stand for braces.
        where: the place of the record, for errors.
        key: the key of the configuration that the text is of, for errors.

    Raises DataError for a field that the record has not, or that is neither text nor a number.
    """
    values = {}
    for name in field_names(text):
        if name not in fields:
            there = ", ".join(fields) or "none"
            hint = "; data.prompts.parser takes it out of the reference" if name in PARSED else ""
            raise DataError(f"{where}: {key} names the field {name}, and the record has {there}{hint}")
        value = fields[name]
        if value is None:
            return None
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise DataError(f"{where}: {name}: expected text or a number, found {type(value).__name__}; {key} names it")
        values[name] = str(value)
    return FIELD_PART.sub(lambda found: values[found[1]] if found[1] else found[0][0], text)


def fill_question(text: str, fields: Mapping[str, Any], where: str, key: str = "question") -> str:
    """As `fill`, for a text that cannot be missing: raises DataError where one of its fields is null."""
    filled = fill(text, fields, where, key)
    if filled is None:
        empty = next(name for name in field_names(text) if fields[name] is None)
        raise DataError(
            f"{where}: {key} names the field {empty}, which is null here; fill it in, or take the record out"
        )
    return filled
