"""Errors of pydantic in the words of someone who writes YAML, with the key that was probably meant."""

import difflib
from collections.abc import Iterable
from typing import Any

from minillm.config.errors import Finding
from minillm.config.nearest import nearest
from minillm.config.shape import Choice, Group, KeyPath, Leaf, Shape, all_keys, child_value, group_of, walk
from minillm.config.wording import expected, show

_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "text", "list": "a list"}


def explain(error: dict[str, Any], path: KeyPath, shape: Shape | None, root: Group, data: Any) -> Finding:
    """The finding that one of pydantic's errors is.

    Args:
        error: an item of ValidationError.errors().
        path: its keys, without the alternatives that pydantic tried.
        shape: the schema there.
        root: the schema of `data`.
        data: the keys that were validated.
    """
    kind, context, given = error["type"], error.get("ctx", {}), error["input"]
    if kind == "missing":
        return Finding(path, _missing(path, shape, root, data), "missing")
    if kind == "extra_forbidden":
        return _unknown(path, root, data)
    if kind == "union_tag_not_found":
        return Finding((*path, shape.key), f"missing: {_one_of(shape.options)}", "missing")
    if kind == "union_tag_invalid":
        return Finding((*path, shape.key), _not_one_of(child_value(given, shape.key), list(shape.options)))
    if kind == "literal_error":
        return Finding(path, _not_one_of(given, shape.names() if isinstance(shape, Leaf) else []))
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        bound = context[key]
        return Finding(path, f"must be {words} {bound if isinstance(bound, int) else f'{bound:g}'}, not {show(given)}")
    if kind == "finite_number":
        return Finding(path, f"must be finite, not {show(given)}")
    if kind == "too_short":
        return Finding(path, "must not be empty")
    if kind == "string_pattern_mismatch":
        return Finding(path, f"{show(given)} is not what goes here: {_description(path, root, data)}")
    return Finding(path, expected(_TYPES.get(kind.partition("_")[0], "keys and values"), given))


def _in_words(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def _unknown(path: KeyPath, root: Group, data: Any) -> Finding:
    name = str(path[-1])
    shape, value = walk(root, data, path[:-1])
    keys = group_of(shape, value).keys()
    near = nearest(name, keys)
    if near is not None:
        return Finding(path, f"unknown key (did you mean {near}?)", "unknown", (*path[:-1], near))
    if isinstance(shape, Choice):
        this, having = value.get(shape.key, shape.default), {}
        for option, group in shape.options.items():
            having.setdefault(nearest(name, group.keys()), []).append(option)
        having.pop(None, None)
        if having:
            others = ", ".join(
                f"{_in_words(options)} {'have' if len(options) > 1 else 'has'} {key}" for key, options in having.items()
            )
            return Finding(path, f"unknown key for {shape.key} {this} ({others})", "unknown")
    known = list(dict.fromkeys(all_keys(root)))
    last = {key: key.rpartition(".")[2] for key in known}
    close = difflib.get_close_matches(name, last.values(), 1, 0.8)
    if close:
        meant = next(key for key in known if last[key] == close[0])
        return Finding(path, f"unknown key (did you mean {meant}?)", "unknown", tuple(meant.split(".")))
    return Finding(path, f"unknown key; there are {', '.join(keys)}", "unknown")


def _missing(path: KeyPath, shape: Shape | None, root: Group, data: Any) -> str:
    if isinstance(shape, Choice):
        return f"missing: {_one_of(shape.options)}, as {shape.key}: ..."
    said = _description(path, root, data)
    if isinstance(shape, Group):
        said = shape.model.__doc__.strip().splitlines()[0].partition(". ")[0].rstrip(".")
    return f"missing: {said[0].lower()}{said[1:]}" if said else "missing"


def _description(path: KeyPath, root: Group, data: Any) -> str:
    """The description of a key in the schema."""
    group = group_of(*walk(root, data, path[:-1]))
    field = group.model.model_fields.get(path[-1]) if group is not None else None
    return (field.description or "") if field is not None else ""


def _one_of(names: Iterable[str]) -> str:
    return f"one of {', '.join(names)}"


def _not_one_of(given: Any, names: list[str]) -> str:
    if len(names) == 1:
        return f"there is no {show(given)} here, only {names[0]}"
    near = nearest(given, names) if isinstance(given, str) else None
    return f"{show(given)} is not {_one_of(names)}" + (f" (did you mean {near}?)" if near else "")
