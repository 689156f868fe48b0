"""Tables of the keys that are not at their defaults, or on which runs do not agree."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from minillm.config.root import StageConfig
from minillm.reporting.markdown import MISSING, cell, table

REQUIRED = "(required)"


def settings_table(stages: Mapping[str, Mapping[str, Any]]) -> str:
    """Tabulate the keys that some stage has away from their defaults: the default, and every stage's value.

    Args:
        stages: column title -> the stage's keys: resolved, or merged as a configuration file has them.
    """
    columns = {name: dict(_leaves(settings)) for name, settings in stages.items()}
    keys = dict.fromkeys(
        key for leaves in columns.values() for key, (value, default) in leaves.items() if value != default
    )
    rows = []
    for key in keys:
        found = [leaves.get(key) for leaves in columns.values()]
        default = next(default for leaf in found if leaf for _, default in [leaf])
        rows.append([f"`{key}`", _shown(default), *(MISSING if leaf is None else _shown(leaf[0]) for leaf in found)])
    return table(["key", "default", *columns], rows, numbers=False) if rows else ""


def differing_keys(runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Tabulate the keys of stages on which the runs do not agree; a default that other runs lack is no disagreement.

    Args:
        runs: column title -> stage -> the stage's keys, as for settings_table.
    """
    columns = {
        run: {(stage, key): leaf for stage, settings in stages.items() for key, leaf in _leaves(settings)}
        for run, stages in runs.items()
    }
    several = any(len(stages) > 1 for stages in runs.values())
    rows = []
    for stage, key in dict.fromkeys(name for leaves in columns.values() for name in leaves):
        leaves = [leaves.get((stage, key)) for leaves in columns.values()]
        present = [leaf for leaf in leaves if leaf is not None]
        agreed = all(value == present[0][0] for value, _ in present)
        if agreed and (len(present) == len(leaves) or all(value == default for value, default in present)):
            continue
        title = f"{stage}: `{key}`" if several else f"`{key}`"
        rows.append([title, *(MISSING if leaf is None else _shown(leaf[0]) for leaf in leaves)])
    return table(["key", *columns], rows, numbers=False) if rows else ""


def _leaves(settings: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(dotted key, (value, today's default)) of every key. Keys of another version have no default."""
    try:
        yield from _model_leaves(StageConfig.model_validate(settings), "")
        return
    except ValidationError as error:
        wrong = [problem["loc"] for problem in error.errors()]
    kept, foreign = copy.deepcopy(dict(settings)), {}
    for place in wrong:
        _move(place, kept, foreign)
    try:
        yield from _model_leaves(StageConfig.model_validate(kept), "")
        yield from _plain_leaves(foreign, "")
    except ValidationError:
        yield from _plain_leaves(settings, "")


def _move(place: tuple[str | int, ...], source: dict[str, Any], target: dict[str, Any]) -> None:
    """Take the key at a place, as pydantic names it, out of one tree of keys and into another."""
    *groups, key = place
    for group in groups:
        if isinstance(
            source.get(group), dict
        ):  # else the name of a kind, which is no key: ("method", "minillm", "alpha")
            source, target = source[group], target.setdefault(group, {})
    if key in source:
        target[key] = source.pop(key)


def _model_leaves(model: BaseModel, prefix: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name, field in type(model).model_fields.items():
        if name == "output_dir":  # where a run lies says nothing about it
            continue
        value, key = getattr(model, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from _model_leaves(value, f"{key}.")
        elif isinstance(value, dict) and any(isinstance(item, BaseModel) for item in value.values()):
            for item_name, item in value.items():
                yield from _model_leaves(item, f"{key}.{item_name}.")
        else:
            default = field.get_default(call_default_factory=True)
            yield key, (value, REQUIRED if default is PydanticUndefined else default)


def _plain_leaves(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _plain_leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", (value, MISSING)


def _shown(value: Any) -> str:
    if value in (REQUIRED, MISSING):
        return MISSING
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return cell("[" + ", ".join(map(str, value)) + "]", limit=120)
    return "none" if value is None else cell(str(value), limit=120)
