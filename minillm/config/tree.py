"""A configuration as a tree whose every value remembers where it was written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minillm.config.errors import Problem
from minillm.config.shape import KeyPath

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Origin:
    """The place where a value was written: the file, the line counted from 1, and the keys above it there."""

    file: str  # COMMAND_LINE for an override
    line: int | None = None
    path: KeyPath = ()

    def below(self, key: str | int, line: int | None = None) -> "Origin":
        """The place of an entry of this value, at the same line unless another is given."""
        return Origin(self.file, self.line if line is None else line, (*self.path, key))

    def problem(self, message: str, path: KeyPath | None = None) -> Problem:
        """The problem that `message` describes, at this place or at another path in the same line."""
        return Problem(self.file, self.line, dotted(self.path if path is None else path), message)


@dataclass(frozen=True)
class Node:
    """A value of a document: a scalar, a list of nodes or a mapping of nodes."""

    value: Any
    origin: Origin

    def plain(self) -> Any:
        """The value without its origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value

    def closest(self, path: KeyPath) -> tuple["Node", int]:
        """The node at `path` or the deepest one above it, and how many keys of the path lead there."""
        node, depth = self, 0
        for key in path:
            inside = isinstance(node.value, dict) and key in node.value
            if not inside and not (isinstance(node.value, list) and isinstance(key, int) and key < len(node.value)):
                break
            node, depth = node.value[key], depth + 1
        return node, depth

    def at(self, path: KeyPath) -> "Node | None":
        """The node at `path`, None where there is none."""
        node, depth = self.closest(path)
        return node if depth == len(path) else None

    def leaves(self, path: KeyPath = ()) -> Iterator[tuple[KeyPath, "Node"]]:
        """(path, node) of every value that is no group, and of every empty group. `path` is that of this node."""
        if isinstance(self.value, dict) and self.value:
            for key, node in self.value.items():
                yield from node.leaves((*path, key))
        else:
            yield path, self


def dotted(path: KeyPath) -> str:
    """A path as people write it: student.layers[0]."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def wrap(value: Any, origin: Origin) -> Node:
    """A plain value as a tree in which everything has the file and the line of `origin`."""
    if isinstance(value, Mapping):
        return Node({key: wrap(item, origin.below(key)) for key, item in value.items()}, origin)
    if isinstance(value, list):
        return Node([wrap(item, origin.below(place)) for place, item in enumerate(value)], origin)
    return Node(value, origin)
