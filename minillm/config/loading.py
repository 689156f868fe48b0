"""Files and overrides to a plan of typed stages; or every problem at once, before any model loads.

files, left to right  ->  then group.key=value  ->  one document  ->  its stages, each merged over the rest
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.config.checks import Facts, check_stage
from minillm.config.document import COMMAND_LINE, Node, Origin, merge, read_file, read_override, wrap
from minillm.config.errors import ConfigErrors, Problem
from minillm.config.messages import Finding, nearest
from minillm.config.paths import expand
from minillm.config.root import OF_THE_RUN, StageConfig
from minillm.config.shape import places, walk
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
    document, whole = _load_document(list(map(Path, files)), overrides, problems)
    drafts = {name: _Draft.of(tree) for name, tree in _stage_trees(document, problems).items()}
    problems += _stage_problems(drafts, whole=whole)
    if problems:
        raise ConfigErrors(_in_order(problems, files))
    stages = [Stage(name, draft.config) for name, draft in drafts.items()]
    return RunPlan(Path(stages[0].config.output_dir), stages, document.plain(), list(map(Path, files)))


def stage_documents(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The plain document of each stage: its own keys merged over what the stages share."""
    return {name: tree.plain() for name, tree in _stage_trees(wrap(document, Origin("")), []).items()}


def _load_document(files: list[Path], overrides: Sequence[str], problems: list[Problem]) -> tuple[Node, bool]:
    """The merged document, and whether all of it could be read."""
    document = Node({}, Origin(str(files[0]) if files else COMMAND_LINE))
    whole = True
    for file in files:
        node = read_file(file, problems)
        whole &= node is not None
        document = document if node is None else _merge_documents(document, node)
    written = Node({}, Origin(COMMAND_LINE))
    for override in overrides:
        node = read_override(override, problems)
        whole &= node is not None
        # among overrides none replaces another's group: the order of `method.name=` and its keys is free
        written = written if node is None else merge(written, node, None)
    if whole:
        problems += _unknown_stages(document, written)
    return _merge_documents(document, written), whole


def _merge_documents(under: Node, over: Node) -> Node:
    merged = merge(_without_stages(under), _without_stages(over), STAGE)
    below, above = under.value.get("stages"), over.value.get("stages")
    stages = below if above is None else above
    if below is not None and above is not None and isinstance(below.value, dict) and isinstance(above.value, dict):
        names = {**below.value, **above.value}
        for name in below.value.keys() & above.value.keys():
            names[name] = merge(below.value[name], above.value[name], STAGE)
        stages = Node(names, below.origin)
    return merged if stages is None else Node({**merged.value, "stages": stages}, merged.origin)


def _without_stages(node: Node) -> Node:
    return Node({key: item for key, item in node.value.items() if key != "stages"}, node.origin)


def _unknown_stages(document: Node, written: Node) -> list[Problem]:
    """An override of a stage that no file has is a misspelt name, never a new stage at the end."""
    known, asked = (walk(None, node.plain(), ("stages",))[1] or {} for node in (document, written))
    problems = []
    for name in asked if isinstance(asked, dict) else ():
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(known)}" if known else "there are none"
            problems.append(Problem(COMMAND_LINE, None, f"stages.{name}", f"no file has this stage ({hint})"))
    return problems


def _stage_trees(document: Node, problems: list[Problem]) -> dict[str, Node]:
    stages, shared = document.value.get("stages"), _without_stages(document)
    if stages is None or stages.value == {}:
        return {MAIN: shared}
    if not isinstance(stages.value, dict):
        problems.append(stages.origin.problem("expected names of stages, each with the keys that it changes"))
        return {MAIN: shared}
    trees = {}
    for name, own in stages.value.items():
        if not name.replace("-", "").replace("_", "").isalnum():
            problems.append(
                own.origin.problem("a stage's name is letters, digits, - and _: a folder is called after it")
            )
        if own.value is None:  # a stage that changes nothing
            own = Node({}, own.origin)
        if not isinstance(own.value, dict):
            problems.append(own.origin.problem("expected the keys that this stage changes"))
            continue
        trees[name] = merge(shared, _without_stages(own), STAGE)
        for path in (("stages",), *(tuple(key.split(".")) for key in OF_THE_RUN)):
            node, depth = own.closest(path)
            if depth == len(path):
                problems.append(node.origin.problem("belongs to the whole run: move it to the top of the file"))
    return trees


@dataclass(frozen=True)
class _Draft:
    """A stage on its way to a configuration."""

    tree: Node
    data: dict[str, Any]  # plain, paths expanded
    config: StageConfig | None
    findings: list[Finding]

    @classmethod
    def of(cls, tree: Node) -> "_Draft":
        data = tree.plain()
        for path, _, text in list(places(STAGE, data)):
            _, group = walk(STAGE, data, path[:-1])
            group[path[-1]] = expand(text)
        return cls(tree, data, *validate_stage(data))

    def problem(self, finding: Finding) -> Problem:
        """The finding where it was written; a key that was not written, where its group was."""
        node, depth = self.tree.closest(finding.path)
        origin, message = node.origin, finding.message
        if finding.kind == "unknown" and origin.path == finding.path:  # at the top of a file
            if nearest(finding.path[0], [*STAGE.keys(), "stages"]) == "stages":
                message = "unknown key (did you mean stages?)"
        path = (*origin.path, *finding.path[depth:])
        return Origin(origin.file, origin.line if depth else None).problem(message, path)


def _stage_problems(drafts: dict[str, _Draft], *, whole: bool) -> list[Problem]:
    """The problems of all stages; what several stages inherit is said once."""
    stages_of: dict[Problem, list[str]] = {}
    facts: dict[str, Facts] = {}
    for name, draft in drafts.items():
        groups = usable_groups(draft.data, draft.findings)
        facts[name] = Facts(name, draft.data, groups, draft.findings, earlier=dict(facts), all_stages=tuple(drafts))
        # where a file could not be read, what seems to be missing may stand in it
        findings = [*draft.findings, *check_stage(facts[name])] if whole else draft.findings
        for finding in findings:
            if whole or finding.kind != "missing":
                stages_of.setdefault(draft.problem(finding), []).append(name)
    problems = []
    for problem, names in stages_of.items():
        if len(set(names)) < len(drafts) and not problem.path.startswith("stages."):
            where = f"in stage {names[0]}" if len(names) == 1 else f"in stages {', '.join(names)}"
            problem = Problem(problem.file, problem.line, problem.path, f"{where}: {problem.message}")
        problems.append(problem)
    return problems


def _in_order(problems: list[Problem], files: Sequence[Path]) -> list[Problem]:
    """As someone reads: file by file, top to bottom, the command line last."""
    order = {str(file): place for place, file in enumerate(files)}
    return sorted(
        dict.fromkeys(problems), key=lambda one: (order.get(one.file, len(order)), one.line or 0, one.path, one.message)
    )
