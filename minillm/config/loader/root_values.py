"""Values at the root of a file that no stage takes, since every stage sets its own."""

import copy
from collections.abc import Mapping
from typing import Any

from minillm.config.errors import Finding, Problem
from minillm.config.loader.drafts import Draft, keys_of_stages
from minillm.config.loader.validation import validate_stage
from minillm.config.root import STAGE_SHAPE
from minillm.config.shape import KeyPath, group_of, walk
from minillm.config.tree import COMMAND_LINE, Node

MOST_NAMED = 3  # keys that a message proposes


def root_problems(shared: Node, drafts: Mapping[str, Draft]) -> list[Problem]:
    """The problems with values that no stage takes.

    They are checked as all values are. A value of the command line is a problem in any case: whoever writes one expects
    it to change something.

    Args:
        shared: the keys that the stages share.
        drafts: all stages.
    """
    problems = []
    for path, node in shared.leaves():
        if not path or any(draft.tree.at(path) is node for draft in drafts.values()):
            continue
        problems += [node.origin.problem(finding.message) for finding in _wrong(path, node, shared, drafts)]
        if node.origin.file == COMMAND_LINE:
            keys = list(dict.fromkeys(keys_of_stages(path, drafts)))
            named = [*keys[:MOST_NAMED], "another stage's"] if len(keys) > MOST_NAMED else keys
            names = " or ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
            instead = f": every stage has its own; write {names}" if keys else ": no stage takes it"
            problems.append(node.origin.problem(f"has no effect{instead}"))
    return problems


def _wrong(path: KeyPath, node: Node, shared: Node, drafts: Mapping[str, Draft]) -> list[Finding]:
    """The findings of the schema in a value, at the root or in the first stage; [] where it is right in one of them."""
    value, wrong = node.plain(), []
    for keys in (shared.plain(), *(_with_value(draft.tree.plain(), path, value) for draft in drafts.values())):
        if group_of(*walk(STAGE_SHAPE, keys, path[:-1])) is None:  # the schema cannot tell what the value would be
            continue
        found = [finding for finding in validate_stage(keys)[1] if finding.path[: len(path)] == path]
        if not found:
            return []
        wrong = wrong or found
    return wrong


def _with_value(keys: dict[str, Any], path: KeyPath, value: Any) -> dict[str, Any]:
    """The keys of a stage with another value at a path, {} where that leads through something that is no group."""
    keys = copy.deepcopy(keys)
    group = keys
    for key in path[:-1]:
        group = group.setdefault(key, {})
        if not isinstance(group, dict):
            return {}
    group[path[-1]] = value
    return keys
