"""Configuration files and overrides as trees that remember where everything was written, and how they are merged.

The YAML is that of version 1.2: 1e-4 is a number, `on` and `no` are text, and a key stands only once in its group.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minillm.config.errors import Problem
from minillm.config.shape import Choice, KeyPath, Shape, child_shape

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Origin:
    """Where something was written, and under which keys."""

    file: str
    line: int | None = None
    path: KeyPath = ()

    def problem(self, message: str, path: KeyPath | None = None) -> Problem:
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


def dotted(path: KeyPath) -> str:
    """student.layers[0]"""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def wrap(value: Any, origin: Origin) -> Node:
    """A plain value as a tree of which every part has the same file and line."""
    if isinstance(value, Mapping):
        return Node({key: wrap(item, _below(origin, key)) for key, item in value.items()}, origin)
    if isinstance(value, list):
        return Node([wrap(item, _below(origin, place)) for place, item in enumerate(value)], origin)
    return Node(value, origin)


def read_file(path: Path, problems: list[Problem]) -> Node | None:
    """The tree of a YAML file; None, and a problem, where there is none."""
    origin = Origin(str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        problems.append(origin.problem(f"no such file (the current folder is {Path.cwd()})"))
        return None
    except (OSError, UnicodeDecodeError) as error:
        problems.append(origin.problem(f"cannot be read as a text file: {error}"))
        return None
    node = _parse(text, origin, problems)
    if node is not None and node.value is None:  # an empty file
        return Node({}, origin)
    if node is not None and not isinstance(node.value, dict):
        problems.append(origin.problem("a configuration file holds keys and values: `key: value` lines"))
        return None
    return node


def read_override(text: str, problems: list[Problem]) -> Node | None:
    """The tree of `group.key=value`; the value is YAML, or text where it is not."""
    key, equals, written = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        problems.append(Problem(COMMAND_LINE, None, "", f"{text!r} is not an override: group.key=value"))
        return None
    origin = Origin(COMMAND_LINE, None, path)
    found: list[Problem] = []
    node = _parse(written, origin, found)
    if found and written.strip()[:1] not in tuple("[{'\""):  # e.g. *.txt, which YAML takes for an alias
        found, node = [], Node(written.strip(), origin)
    problems.extend(found)
    if node is None:
        return None
    for depth in reversed(range(len(path))):
        node = Node({path[depth]: node}, Origin(COMMAND_LINE, None, path[:depth]))
    return node


def merge(under: Node, over: Node, shape: Shape | None) -> Node:
    """`over` wins; groups are merged key by key, unless `over` changes which of several groups it is, or is null."""
    if not isinstance(under.value, dict) or not isinstance(over.value, dict):
        return over
    if isinstance(shape, Choice) and shape.key in over.value:
        before = under.value[shape.key].plain() if shape.key in under.value else shape.default
        if before is not None and before != over.value[shape.key].plain():
            return over
    merged = {**under.value, **over.value}
    keys = {key: node.plain() for key, node in merged.items()}
    for key in under.value.keys() & over.value.keys():
        if over.value[key].value is None and isinstance(under.value[key].value, dict):
            del merged[key]  # null takes a group, or an entry of one, away
        else:
            merged[key] = merge(under.value[key], over.value[key], child_shape(shape, keys, key))
    return Node(merged, under.origin)


def dump(value: Any) -> str:
    """YAML that reads back as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}


class _Dumper(yaml.SafeDumper):
    """Quotes every text that readers of YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, items: list) -> yaml.Node:
        flow = not any(isinstance(item, dict | list) for item in items)
        return self.represent_sequence(f"{_TAG}seq", items, flow_style=flow)


_Dumper.add_representer(list, _Dumper.represent_list)

_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+)"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}
for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})$"), _first)


def _parse(text: str, origin: Origin, problems: list[Problem]) -> Node | None:
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return Node(None, origin) if node is None else _convert(node, loader, origin, problems, ())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = origin.line if mark is None or origin.file == COMMAND_LINE else mark.line + 1
        what = getattr(error, "problem", None) or str(error).replace("\n", " ")
        hint = "; YAML is indented with spaces, not tabs" if "\\t" in what else ""
        problems.append(Origin(origin.file, line, origin.path).problem(f"not valid YAML: {what}{hint}"))
        return None
    finally:
        if loader is not None:
            loader.dispose()


def _convert(
    node: yaml.Node, loader: _Loader, origin: Origin, problems: list[Problem], around: tuple[yaml.Node, ...]
) -> Node:
    """The tree of a YAML node, keys as text; every duplicate key and every unknown tag is a problem."""
    if any(node is outer for outer in around):
        problems.append(origin.problem(f"the anchor at line {node.start_mark.line + 1} contains itself"))
        return Node(None, origin)
    if node.tag.removeprefix(_TAG) not in {*_SCALARS, "str", "seq", "map"}:
        problems.append(origin.problem(f"the tag {node.tag.replace(_TAG, '!!')} has no meaning here"))
        return Node(None, origin)
    if isinstance(node, yaml.SequenceNode):
        items = [
            _convert(item, loader, _below(origin, place, item), problems, (*around, node))
            for place, item in enumerate(node.value)
        ]
        return Node(items, origin)
    if isinstance(node, yaml.ScalarNode):
        try:
            return Node(node.value if node.tag == f"{_TAG}merge" else loader.construct_object(node), origin)
        except (ValueError, KeyError):  # !!int three
            problems.append(origin.problem(f"{node.value!r} is not what the tag before it says"))
            return Node(None, origin)
    entries: dict[str, Node] = {}
    for key, value in _entries(node, origin, problems):
        below = _below(origin, key.value, key)
        if key.value in entries:
            before = entries[key.value].origin.line
            problems.append(below.problem("stands twice" if before is None else f"stands already at line {before}"))
            continue
        entries[key.value] = _convert(value, loader, below, problems, (*around, node))
    return Node(entries, origin)


def _entries(
    node: yaml.MappingNode, origin: Origin, problems: list[Problem], around: tuple[yaml.Node, ...] = ()
) -> list[tuple[yaml.Node, yaml.Node]]:
    """(key, value) of a mapping; what `<<` brings in comes last and gives way to the mapping's own keys."""
    own, brought = [], []
    for key, value in node.value:
        if key.tag == f"{_TAG}merge":
            sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for source in sources:
                if isinstance(source, yaml.MappingNode) and all(source is not outer for outer in (*around, node)):
                    brought += _entries(source, origin, problems, (*around, node))
                else:
                    problems.append(_below(origin, "<<", key).problem("takes a group, or a list of groups"))
        elif isinstance(key, yaml.ScalarNode):
            own.append((key, value))
        else:
            problems.append(_below(origin, "?", key).problem("a key is plain text"))
    names = {key.value for key, _ in own}
    for key, value in brought:
        if key.value not in names:
            names.add(key.value)
            own.append((key, value))
    return own


def _below(origin: Origin, key: str | int, node: yaml.Node | None = None) -> Origin:
    line = origin.line if node is None or origin.file == COMMAND_LINE else node.start_mark.line + 1
    return Origin(origin.file, line, (*origin.path, key))
