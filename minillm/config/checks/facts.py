"""The facts that checks look at: the keys of a stage, and the sizes of its models where a local config.json has them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minillm.config.errors import Finding
from minillm.config.paths import STAGE
from minillm.config.shape import KeyPath
from minillm.config.tree import Node
from minillm.config.upcycle import SPARSE_FORMS

# The names that families give to these sizes.
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


@dataclass(frozen=True)
class Facts:
    """One stage, as far as it could be read."""

    name: str
    data: dict[str, Any]  # plain keys, with paths expanded
    groups: dict[str, Any]  # the typed groups without what is in error
    findings: list[Finding]  # what the schema finds
    earlier: Mapping[str, "Facts"]  # the stages before this one
    all_stages: tuple[str, ...]
    tree: Node | None = None  # the same keys, with the places where they were written

    @classmethod
    def unread(cls, name: str) -> "Facts":
        """A stage of which only the name is known."""
        return cls(name, {}, {}, [], {}, ())

    def together(self, first: str, second: str) -> bool:
        """True for two keys that were written side by side, in a place that no other stage inherits from."""
        nodes = [self.tree and self.tree.at(tuple(key.split("."))) for key in (first, second)]
        if None in nodes:
            return False
        shared = len(self.all_stages) > 1 and any(node.origin.path[:1] != ("stages",) for node in nodes)
        return beside(*nodes) and not shared


def beside(one: Node, other: Node) -> bool:
    """True for two values that were written in the same group of the same file."""
    return (one.origin.file, one.origin.path[:-1]) == (other.origin.file, other.origin.path[:-1])


@dataclass(frozen=True)
class Found:
    """A mistake that a check found: the key that the message is about, and the other keys that it comes from."""

    key: str | KeyPath
    message: str
    reads: tuple[str | KeyPath, ...] = ()

    @property
    def path(self) -> KeyPath:
        return as_path(self.key)


@dataclass(frozen=True)
class Idle(Found):
    """A key, or a group, that does nothing in this stage because of the first key of `reads`.

    Files may be shared between methods, so that most such keys are fine. Mistakes are those of the command line, and
    those that stand beside the very key that takes their effect away.
    """

    def __post_init__(self) -> None:
        if not self.reads:
            raise ValueError(f"{self.key}: an idle key names the key that takes its effect away")


def as_path(key: str | KeyPath) -> KeyPath:
    """A key as a path: "train.max_steps" is ("train", "max_steps"); a path stays."""
    return tuple(key.split(".")) if isinstance(key, str) else key


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model, None where they are not known without loading it."""

    context: int | None = None  # tokens
    layers: int | None = None


def architecture_of(facts: Facts, who: Literal["student", "teacher"], *, pruned: bool = True) -> Architecture:
    """The sizes in the config.json of a local folder or of an earlier stage's model, or in the keys of a random student.

    With `pruned` false, a student that is to be pruned counts as it is before.
    """
    keys = architecture_keys(facts, who, pruned=pruned)
    return Architecture(context_of(keys), _first(keys, _LAYERS))


def architecture_keys(facts: Facts, who: str, *, pruned: bool = True) -> dict[str, Any]:
    """The keys of a model's config.json, as far as they are known; those of the text model where it has several."""
    group = facts.groups.get(who)
    if group is None:
        return {}
    keys = keys_at(facts, getattr(group, "path", None) or getattr(group, "model", None) or "")
    if who == "student" and group.init == "random":
        keys = {**keys, **(group.config or {})}
    if who == "student" and pruned and group.init == "prune" and group.layers is not None:
        kept = group.layers if isinstance(group.layers, int) else len(group.layers)
        keys = {**{key: value for key, value in keys.items() if key not in _LAYERS}, _LAYERS[0]: kept}
    if who == "student" and group.init == "upcycle" and keys.get("model_type") in SPARSE_FORMS:
        keys = {**keys, "model_type": SPARSE_FORMS[keys["model_type"]].model_type}
    return keys


def keys_at(facts: Facts, path: str) -> dict[str, Any]:
    """The keys of the architecture of a local folder, or of the model that an earlier stage leaves; {} for other places."""
    if path.startswith(STAGE):
        source = facts.earlier.get(path.removeprefix(STAGE))
        return {} if source is None else architecture_keys(source, "student")
    keys = read_config_json(Path(path)) if path else {}
    return keys["text_config"] if isinstance(keys.get("text_config"), dict) else keys


def context_of(keys: Mapping[str, Any]) -> int | None:
    """The number of tokens that a model with these keys can read; None where they do not say it."""
    return _first(keys, _CONTEXT)


def read_config_json(folder: Path) -> dict[str, Any]:
    """The config.json of a model's folder; {} where there is none that can be read."""
    try:
        keys = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return keys if isinstance(keys, dict) else {}


def _first(keys: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((keys[name] for name in names if isinstance(keys.get(name), int)), None)
