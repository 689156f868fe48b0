"""Drafts of stages, and the problems with them at the places where their keys were written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from minillm.config.checks.facts import Facts
from minillm.config.checks.stage_checks import check_stage
from minillm.config.errors import Finding, Problem
from minillm.config.loader.validation import usable_groups, validate_stage
from minillm.config.nearest import nearest
from minillm.config.paths import expand
from minillm.config.root import STAGE_SHAPE, StageConfig
from minillm.config.shape import KeyPath, group_of, places, walk
from minillm.config.tree import COMMAND_LINE, Node, dotted


@dataclass(frozen=True)
class Draft:
    """The keys of one stage, and the findings of the schema in them."""

    tree: Node
    data: dict[str, Any]  # plain, with `$VAR` and `~` expanded, as the checks look at it
    config: StageConfig | None  # with paths as they were written, the same on every machine; None where keys are wrong
    findings: list[Finding]

    @classmethod
    def of(cls, tree: Node) -> "Draft":
        """The draft of a stage's keys."""
        data = tree.plain()
        config, findings = validate_stage(data)
        for path, _, text in list(places(STAGE_SHAPE, data)):
            _, group = walk(STAGE_SHAPE, data, path[:-1])
            group[path[-1]] = expand(text)
        return cls(tree, data, config, findings)

    def problem(self, finding: Finding) -> Problem:
        """The finding at the place where its key was written; for a missing key, the place of its group."""
        node, depth = self.tree.closest(finding.path)
        origin, message = node.origin, finding.message
        if finding.kind == "unknown" and origin.path == finding.path:  # at the top of a file
            if nearest(finding.path[0], [*STAGE_SHAPE.keys(), "stages"]) == "stages":
                message = "unknown key (did you mean stages?)"
        return origin.problem(message, (*origin.path, *finding.path[depth:]))

    def knows(self, path: KeyPath) -> bool:
        """True where the schema has this key in this stage."""
        group = group_of(*walk(STAGE_SHAPE, self.data, path[:-1]))
        return group is not None and path[-1] in group.keys()


def stage_problems(drafts: Mapping[str, Draft], *, whole: bool) -> list[Problem]:
    """The problems of all stages. What several stages inherit is said once.

    Args:
        drafts: the stages by name, in order.
        whole: False where a file could not be read; then what seems to be missing may stand in that file.
    """
    stages_of: dict[Problem, list[str]] = {}
    facts: dict[str, Facts] = {}
    findings: dict[str, list[Finding]] = {}
    for name, draft in drafts.items():
        groups = usable_groups(draft.data, draft.findings)
        facts[name] = Facts(name, draft.data, groups, draft.findings, dict(facts), tuple(drafts), draft.tree)
        findings[name] = [*draft.findings, *check_stage(facts[name])] if whole else draft.findings
    for name, draft in drafts.items():
        for finding in findings[name]:
            if finding.kind == "missing" and not whole or finding.kind == "idle" and _works(drafts, findings, finding):
                continue
            stages_of.setdefault(_with_hint(draft.problem(finding), finding, draft, drafts), []).append(name)
    problems = []
    for problem, names in stages_of.items():
        if len(set(names)) < len(drafts) and not problem.path.startswith("stages."):
            where = f"in stage {names[0]}" if len(names) == 1 else f"in stages {', '.join(names)}"
            problem = Problem(problem.file, problem.line, problem.path, f"{where}: {problem.message}")
        problems.append(problem)
    return problems


def _works(drafts: Mapping[str, Draft], findings: Mapping[str, list[Finding]], idle: Finding) -> bool:
    """True where a key that does nothing in one stage does something in another that inherits the same value."""
    idle_in = [name for name in drafts if any(one.kind == "idle" and one.path == idle.path for one in findings[name])]
    values = [drafts[name].tree.at(idle.path) for name in idle_in]
    return any(
        name not in idle_in and any(draft.tree.at(idle.path) is value for value in values)
        for name, draft in drafts.items()
    )


def _with_hint(problem: Problem, finding: Finding, draft: Draft, drafts: Mapping[str, Draft]) -> Problem:
    """The problem, where it is an unknown key of the command line with the keys of the stages that know it."""
    node = draft.tree.at(finding.path)
    if (
        finding.kind != "unknown"
        or node is None
        or (node.origin.file, node.origin.path) != (COMMAND_LINE, finding.path)
    ):
        return problem
    others = list(keys_of_stages(finding.path, drafts))
    hint = f"; write {' or '.join(others)}" if others else ""
    return Problem(problem.file, problem.line, problem.path, problem.message + hint)


def keys_of_stages(path: KeyPath, drafts: Mapping[str, Draft]) -> Iterator[str]:
    """The keys, as they are written above a stage, that set `path` for each stage that has it to itself."""
    for draft in drafts.values():
        node, depth = draft.tree.closest(path)
        own = (*node.origin.path, *path[depth:])
        if own != path and draft.knows(path):
            yield dotted(own)
