"""Files and overrides to a plan of typed stages; or every problem at once, before any model loads.

    files, left to right  ->  then group.key=value  ->  one document  ->  its stages, each merged over the rest
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.config.checks import Facts, check_stage
from minillm.config.document import COMMAND_LINE, Node, Origin, dotted, merge, read_file, read_override, wrap
from minillm.config.errors import ConfigErrors, Problem
from minillm.config.messages import Finding, nearest
from minillm.config.paths import expand
from minillm.config.root import OF_THE_RUN, StageConfig
from minillm.config.shape import KeyPath, places, walk
from minillm.config.validation import STAGE, usable_groups, validate_stage

MAIN = "main"  # the stage of a file without stages


@dataclass(frozen=True)
class Stage:
    """One stage, validated."""

    name: str
    config: StageConfig


@dataclass(frozen=True)
class RunPlan:
    """What a run does."""

    output_dir: Path
    stages: list[Stage]  # in order
    document: dict[str, Any]  # the merged files and overrides, as they were written
    files: list[Path]


def load_run(files: Sequence[Path], overrides: Sequence[str] = ()) -> RunPlan:
    """Merge, resolve the stages, validate and check.

    Args:
        files: YAML files, merged left to right.
        overrides: `group.key=value`, merged over the files.

    Raises ConfigErrors with every problem of every file, override and stage.
    """
    problems: list[Problem] = []
    document = load_document(files, overrides, problems)
    whole = not problems  # where a file could not be read, keys that seem missing may stand in it
    drafts = _drafts(document, problems)
    problems += _problems(drafts, document, whole=whole)
    if problems:
        raise ConfigErrors(_sorted(problems, files))
    stages = [Stage(name, draft.config) for name, draft in drafts.items()]
    return RunPlan(Path(stages[0].config.output_dir), stages, document.plain(), list(map(Path, files)))


def load_document(files: Sequence[Path], overrides: Sequence[str], problems: list[Problem]) -> Node:
    """The merged document of files and overrides; what could not be read is left out and added to `problems`."""
    read = [node for node in (read_file(Path(file), problems) for file in files) if node is not None]
    document = Node({}, Origin(str(files[0]) if files else COMMAND_LINE))
    for node in read:
        document = _merge_documents(document, node)
    written = Node({}, Origin(COMMAND_LINE))
    for override in overrides:
        node = read_override(override, problems)
        if node is not None:
            written = merge(written, node, None)  # among overrides the order of `name` and the keys it allows is free
    problems += _unknown_stages(document, written, unread=len(read) < len(files))
    return _merge_documents(document, written) if written.value else document


def stage_documents(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The plain document of each stage: its own keys merged over what the stages share. For config.yaml of a run."""
    return {name: tree.plain() for name, tree in _stage_trees(wrap(document, Origin("")), []).items()}


@dataclass(frozen=True)
class _Draft:
    """A stage on its way to a configuration."""

    tree: Node
    data: dict[str, Any]  # plain, paths expanded
    config: StageConfig | None
    findings: list[Finding]


def _merge_documents(under: Node, over: Node) -> Node:
    merged = merge(_without_stages(under), _without_stages(over), STAGE)
    below, above = under.value.get("stages"), over.value.get("stages")
    if above is None or below is None:
        stages = above or below
    elif not isinstance(below.value, dict) or not isinstance(above.value, dict):
        stages = above
    else:
        stages = Node(dict(below.value), above.origin)
        for name, stage in above.value.items():
            stages.value[name] = merge(below.value[name], stage, STAGE) if name in below.value else stage
    return merged if stages is None else Node({**merged.value, "stages": stages}, merged.origin)


def _without_stages(node: Node) -> Node:
    return Node({key: item for key, item in node.value.items() if key != "stages"}, node.origin)


def _unknown_stages(document: Node, written: Node, *, unread: bool) -> Iterable[Problem]:
    """An override of a stage that no file has is a misspelt name, never a new stage at the end."""
    known, asked = (_names(node) for node in (document, written))
    for name in asked:
        if name not in known and not unread:
            near = nearest(name, known)
            hint = f" (did you mean {near}?)" if near else f"; there are {', '.join(known)}" if known else ""
            yield Problem(COMMAND_LINE, None, f"stages.{name}", f"no file has this stage{hint}")


def _names(document: Node) -> list[str]:
    stages = document.value.get("stages")
    return list(stages.value) if stages is not None and isinstance(stages.value, dict) else []


def _stage_trees(document: Node, problems: list[Problem]) -> dict[str, Node]:
    stages, shared = document.value.get("stages"), _without_stages(document)
    if stages is None or stages.value == {}:
        return {MAIN: shared}
    if not isinstance(stages.value, dict):
        problems.append(stages.origin.problem("expected names of stages, each with the keys that it changes"))
        return {MAIN: shared}
    trees = {}
    for name, own in stages.value.items():
        if not name.replace("-", "_").isidentifier() and not name.isalnum():
            problems.append(own.origin.problem("the name of a stage is letters, digits, - and _: it names a folder"))
        if own.value is None:  # a stage that changes nothing
            own = Node({}, own.origin)
        if not isinstance(own.value, dict):
            problems.append(own.origin.problem("expected the keys that this stage changes"))
            continue
        trees[name] = merge(shared, own, STAGE)
        for path in [("stages",), *(tuple(key.split(".")) for key in OF_THE_RUN)]:
            node, depth = own.closest(path)
            if depth == len(path):
                problems.append(node.origin.problem("belongs to the whole run: move it to the top of the file"))
    return trees
