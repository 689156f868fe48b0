"""What the checks know of a stage: its keys, and the sizes of its models where a local config.json tells them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minillm.config.errors import Finding
from minillm.config.paths import STAGE
from minillm.config.shape import KeyPath
from minillm.config.tree import Node

# As the families call them: GPT-2 and others have names of their own.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class Facts:
    """One stage as far as it could be read."""

    name: str
    data: dict[str, Any]  # its keys, plain, with paths expanded
    groups: dict[str, Any]  # the typed groups without what is in error
    findings: list[Finding]  # of the schema
    earlier: Mapping[str, "Facts"]  # the stages before this one
    all_stages: tuple[str, ...]
    tree: Node | None = None  # the same keys with where each was written

    def together(self, first: str, second: str) -> bool:
        """Whether two keys that were written stand side by side, for this stage alone."""
        if self.tree is None:
            return False
        found = [self.tree.closest(tuple(key.split("."))) for key in (first, second)]
        if any(depth != key.count(".") + 1 for (_, depth), key in zip(found, (first, second), strict=True)):
            return False
        places = {(node.origin.file, node.origin.path[:-1]) for node, _ in found}
        of_all = len(self.all_stages) > 1 and any(path[:1] != ("stages",) for _, path in places)
        return len(places) == 1 and not of_all


@dataclass(frozen=True)
class Found:
    """What a check found: the key it is said at, and the other keys that it comes from."""

    key: str | KeyPath
    message: str
    reads: tuple[str | KeyPath, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model, None where they are not known without loading it."""

    context: int | None = None  # tokens
    layers: int | None = None


def architecture_of(facts: Facts, who: Literal["student", "teacher"], *, pruned: bool = True) -> Architecture:
    """Read from the config.json of a local folder, of an earlier stage's model, or from the keys of a random student.

    With `pruned` false a student that is to be pruned counts as it is before.
    """
    keys = _model_keys(facts, who, pruned)
    return Architecture(_first(keys, _CONTEXT), _first(keys, _LAYERS))


def _model_keys(facts: Facts, who: str, pruned: bool) -> dict[str, Any]:
    group = facts.groups.get(who)
    if group is None:
        return {}
    path = group.path or ""
    if path.startswith(STAGE):
        source = facts.earlier.get(path.removeprefix(STAGE))
        keys = {} if source is None else _model_keys(source, "student", True)
    else:
        keys = _read(Path(path) / "config.json") if path else {}
    if who == "student" and group.init == "random":
        keys = {**keys, **(group.config or {})}
    if who == "student" and pruned and group.init == "prune" and group.layers is not None:
        kept = group.layers if isinstance(group.layers, int) else len(group.layers)
        keys = {**{key: value for key, value in keys.items() if key not in _LAYERS}, _LAYERS[0]: kept}
    return keys


def _read(path: Path) -> dict[str, Any]:
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    text_model = keys.get("text_config") if isinstance(keys, dict) else None
    return text_model if isinstance(text_model, dict) else keys if isinstance(keys, dict) else {}


def _first(keys: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((keys[name] for name in names if isinstance(keys.get(name), int)), None)
