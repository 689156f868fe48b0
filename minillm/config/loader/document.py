"""Configuration files and overrides as trees that remember the place of everything, and the merging of such trees."""

from pathlib import Path

from minillm.config.errors import Problem
from minillm.config.loader.yaml_text import parse
from minillm.config.shape import Choice, Shape, child_shape
from minillm.config.tree import COMMAND_LINE, Node, Origin

OVERRIDE = "an override is written group.key=value"


def read_file(path: Path, problems: list[Problem]) -> Node | None:
    """The tree of a YAML file; None, and a problem, where it cannot be read."""
    origin = Origin(str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        hint = "" if path.suffix in (".yaml", ".yml") else f"; {OVERRIDE}"
        problems.append(origin.problem(f"no such file (the current folder is {Path.cwd()}){hint}"))
        return None
    except (OSError, ValueError) as error:  # not UTF-8, or a name that no file can have
        problems.append(origin.problem(f"cannot be read as a text file: {error}"))
        return None
    node = parse(text, origin, problems)
    if node is not None and node.value is None:  # an empty file
        return Node({}, origin)
    if node is not None and not isinstance(node.value, dict):
        problems.append(origin.problem("a configuration file holds keys and values: `key: value` lines"))
        return None
    return node


def read_override(text: str, problems: list[Problem]) -> Node | None:
    """The tree of `group.key=value`, whose value is YAML, or text where it is not; None, and a problem, of no override."""
    key, equals, written = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        problems.append(Problem(COMMAND_LINE, None, "", f"{text!r} is not an override; {OVERRIDE}"))
        return None
    origin = Origin(COMMAND_LINE, None, path)
    found: list[Problem] = []
    node = parse(written, origin, found)
    if (
        node is not None
        and isinstance(node.value, str)
        and "\n" in written.strip()
        and written.strip()[0] not in "'\"|>"
    ):
        node = Node(written, origin)  # YAML would make a space of the line break, and another name of a folder's
    if found and written.strip()[:1] not in tuple("[{'\""):  # such as *.txt, which YAML takes for an alias
        found, node = [], Node(written.strip(), origin)
    problems.extend(found)
    if node is not None and node.value == {}:
        problems.append(origin.problem("has no effect: nothing is merged into the group; null takes it away"))
    if node is None:
        return None
    for depth in reversed(range(len(path))):
        node = Node({path[depth]: node}, Origin(COMMAND_LINE, None, path[:depth]))
    return node


def merge(under: Node, over: Node, shape: Shape | None) -> Node:
    """The two trees merged, where `over` wins.

    Groups are merged key by key. A group of `over` that has another discriminator replaces the one below it; null takes
    a group, or an entry of one, away.
    """
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
            del merged[key]
        else:
            merged[key] = merge(under.value[key], over.value[key], child_shape(shape, keys, key))
    return Node(merged, under.origin)
