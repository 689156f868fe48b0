"""YAML text as trees, and values as YAML text.

The YAML is that of version 1.2: 1e-4 is a number, `on` and `no` are text, and a key stands only once in its group.
"""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError

from minillm.config.errors import Problem
from minillm.config.tree import COMMAND_LINE, Node, Origin

# Far above any configuration, and far below what exhausts Python's stack or the memory.
MOST_LEVELS, MOST_VALUES = 100, 100_000

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


def parse(text: str, origin: Origin, problems: list[Problem]) -> Node | None:
    """The tree of a text, or None where it is not YAML. `problems` receives what is wrong."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return Node(None, origin) if node is None else _TreeBuilder(loader, problems).tree(node, origin)
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


def dump(value: Any) -> str:
    """YAML that reads back as the same values."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict = {}
    level = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.level == MOST_LEVELS:
            raise ComposerError(None, None, f"nested more than {MOST_LEVELS} levels deep", self.peek_event().start_mark)
        self.level += 1
        node = super().compose_node(parent, index)
        self.level -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every text that readers of YAML 1.1 or 1.2 would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, items: list) -> yaml.Node:
        flow = not any(isinstance(item, dict | list) for item in items)
        return self.represent_sequence(f"{_TAG}seq", items, flow_style=flow)


_Dumper.add_representer(list, _Dumper.represent_list)
for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"(?:{_pattern})$"), _first)


class _TreeBuilder:
    """Turns YAML nodes into trees. Keys are text; duplicate keys and unknown tags are problems."""

    def __init__(self, loader: _Loader, problems: list[Problem]):
        self.loader, self.problems, self.values = loader, problems, 0

    def tree(self, node: yaml.Node, origin: Origin, around: tuple[yaml.Node, ...] = ()) -> Node:
        """The tree of a node that lies in those of `around`."""
        self._count(node)
        if any(node is outer for outer in around):
            self._wrong(origin, f"the anchor at line {node.start_mark.line + 1} contains itself")
            return Node(None, origin)
        if node.tag.removeprefix(_TAG) not in {*_SCALARS, "str", "seq", "map"}:
            self._wrong(origin, f"the tag {node.tag.replace(_TAG, '!!')} has no meaning here")
            return Node(None, origin)
        if isinstance(node, yaml.SequenceNode):
            items = [
                self.tree(item, _below(origin, place, item), (*around, node)) for place, item in enumerate(node.value)
            ]
            return Node(items, origin)
        if isinstance(node, yaml.ScalarNode):
            return Node(self._scalar(node, origin), origin)
        entries: dict[str, Node] = {}
        for key, value in self._entries(node, origin):
            below = _below(origin, key.value, key)
            if key.value in entries:
                before = entries[key.value].origin.line
                self._wrong(below, "stands twice" if before is None else f"stands already at line {before}")
                continue
            entries[key.value] = self.tree(value, below, (*around, node))
        return Node(entries, origin)

    def _scalar(self, node: yaml.ScalarNode, origin: Origin) -> Any:
        if node.tag == f"{_TAG}merge":
            return node.value
        try:
            value = self.loader.construct_object(node)
            if isinstance(value, str):
                value.encode()
            return value
        except UnicodeEncodeError:
            self._wrong(origin, f"{node.value!r} holds half a character, which is no text")
            return None
        except (ValueError, KeyError):  # !!int three, or a number of thousands of digits
            text = repr(node.value) if len(node.value) <= 80 else f"{node.value[:77]!r}..."
            self._wrong(origin, f"{text} cannot be read as {node.tag.replace(_TAG, '!!')}")
            return None

    def _entries(
        self, node: yaml.MappingNode, origin: Origin, around: tuple[yaml.Node, ...] = ()
    ) -> list[tuple[yaml.Node, yaml.Node]]:
        """(key, value) of a mapping. Those that `<<` brings in come last and give way to the mapping's own keys."""
        own, brought = [], []
        for key, value in node.value:
            self._count(key)
            if key.tag == f"{_TAG}merge":
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in sources:
                    if isinstance(source, yaml.MappingNode) and all(source is not outer for outer in (*around, node)):
                        brought += self._entries(source, origin, (*around, node))
                    else:
                        self._wrong(_below(origin, "<<", key), "takes a group, or a list of groups")
            elif isinstance(key, yaml.ScalarNode):
                own.append((key, value))
            else:
                self._wrong(_below(origin, "?", key), "a key is plain text")
        names = {key.value for key, _ in own}
        for key, value in brought:
            if key.value not in names:
                names.add(key.value)
                own.append((key, value))
        return own

    def _count(self, node: yaml.Node) -> None:
        """Stop at texts whose aliases repeat each other into billions of values."""
        self.values += 1
        if self.values > MOST_VALUES:
            what = f"more than {MOST_VALUES:,} keys and values, those that aliases repeat counted"
            raise ComposerError(None, None, what, node.start_mark)

    def _wrong(self, origin: Origin, message: str) -> None:
        self.problems.append(origin.problem(message))


def _below(origin: Origin, key: str | int, node: yaml.Node) -> Origin:
    return origin.below(key, None if origin.file == COMMAND_LINE else node.start_mark.line + 1)
