"""Files and overrides to a plan of typed stages; or every problem at once, before any model loads.

files, left to right  ->  then group.key=value  ->  one document  ->  its stages, each merged over the rest
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from minillm.config.checks.facts import Facts
from minillm.config.checks.stage_checks import check_stage
from minillm.config.errors import ConfigErrors, Finding, Problem
from minillm.config.evaluation import EvalConfig
from minillm.config.loader.stages import load_document, stage_trees
from minillm.config.loader.validation import usable_groups, validate_stage
from minillm.config.models import TeacherConfig
from minillm.config.nearest import nearest
from minillm.config.paths import expand
from minillm.config.rollout import RolloutConfig
from minillm.config.root import STAGE_SHAPE, StageConfig
from minillm.config.shape import places, walk
from minillm.config.training import DeepSpeedEngine, TorchEngine
from minillm.config.tree import Node


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
    document, whole = load_document(list(map(Path, files)), overrides, problems)
    stages = checked_stages(document, problems, whole=whole)
    raise_problems(problems, files)
    return RunPlan(Path(expand(stages[0].config.output_dir)), stages, document.plain(), list(map(Path, files)))


def checked_stages(document: Node, problems: list[Problem], *, whole: bool = True) -> list[Stage]:
    """The stages of a merged document; what is wrong with them goes to `problems`, and then the stages mean nothing.

    `whole` says that nothing of the document is missing because a file could not be read.
    """
    drafts = {name: _Draft.of(tree) for name, tree in stage_trees(document, problems).items()}
    problems += _stage_problems(drafts, whole=whole)
    return [Stage(name, draft.config) for name, draft in drafts.items()]


def resolved(plan: RunPlan) -> dict[str, Any]:
    """The document with nothing left to inherit or to default; it loads to the same plan."""
    stages = {stage.name: stage.config.model_dump(mode="json") for stage in plan.stages}
    if not plan.document.get("stages"):
        return next(iter(stages.values()))
    report_to = plan.stages[0].config.log.report_to
    for stage in stages.values():
        del stage["output_dir"], stage["log"]["report_to"]
    return {"output_dir": plan.document["output_dir"], "log": {"report_to": list(report_to)}, "stages": stages}


@dataclass(frozen=True)
class EvaluationPlan:
    """What an evaluation without training takes from a configuration: that of its last stage."""

    output_dir: Path  # where stage:NAME points
    seed: int
    teacher: TeacherConfig | None
    engine: TorchEngine | DeepSpeedEngine
    rollout: RolloutConfig
    eval: EvalConfig


def load_evaluation(
    files: Sequence[Path], overrides: Sequence[str] = (), *, base: dict[str, Any] | None = None
) -> EvaluationPlan:
    """The groups that an evaluation needs, validated and checked; the others may be missing and are not looked at.

    Args:
        files: YAML files, merged left to right.
        overrides: `group.key=value`, merged over the files.
        base: keys that the files are merged over.

    Raises ConfigErrors with every problem.
    """
    problems: list[Problem] = []
    document, whole = load_document(list(map(Path, files)), overrides, problems, base)
    trees = stage_trees(document, problems)
    if not trees:
        raise_problems(problems, files)
    *before, (name, tree) = trees.items()
    evaluation = checked_evaluation(tree, problems, name=name, before=[other for other, _ in before], whole=whole)
    raise_problems(problems, files)
    return evaluation


def checked_evaluation(
    tree: Node, problems: list[Problem], *, name: str, before: Sequence[str] = (), whole: bool = True
) -> EvaluationPlan | None:
    """The groups of a stage that an evaluation needs; None, and what is wrong with them in `problems`.

    Args:
        tree: the stage's keys.
        problems: what is wrong is added here.
        name: of the stage.
        before: the stages before it, of which models are there.
        whole: nothing of the tree is missing because a file could not be read.
    """
    others = set(STAGE_SHAPE.keys()) - {field.name for field in fields(EvaluationPlan)}
    draft = _Draft.of(Node({key: node for key, node in tree.value.items() if key not in others}, tree.origin))
    findings = [one for one in draft.findings if one.path[0] not in others and one.path != ("output_dir",)]
    typed = {key: group for key, group in usable_groups(draft.data, findings).items() if key not in others}
    if whole:
        earlier = {other: Facts(other, {}, {}, [], {}, ()) for other in before}
        findings += check_stage(Facts(name, draft.data, typed, findings, earlier, all_stages=(*earlier, name)))
    asked = typed.get("eval")
    if asked is not None and not asked.sets and (asked.exposure_bias is not None or not asked.calibration):
        findings.append(Finding(("eval", "sets"), "missing: held-out prompts to evaluate on", "missing"))
    found = [draft.problem(finding) for finding in findings if whole or finding.kind != "missing"]
    problems += found
    return None if found else EvaluationPlan(**{**typed, "output_dir": Path(typed.get("output_dir", "."))})


@dataclass(frozen=True)
class _Draft:
    """A stage on its way to a configuration."""

    tree: Node
    data: dict[str, Any]  # plain, with `$VAR` and `~` expanded: what the checks look at
    config: StageConfig | None  # with paths as they were written: the same on every machine
    findings: list[Finding]

    @classmethod
    def of(cls, tree: Node) -> "_Draft":
        data = tree.plain()
        config, findings = validate_stage(data)
        for path, _, text in list(places(STAGE_SHAPE, data)):
            _, group = walk(STAGE_SHAPE, data, path[:-1])
            group[path[-1]] = expand(text)
        return cls(tree, data, config, findings)

    def problem(self, finding: Finding) -> Problem:
        """The finding where it was written; a key that was not written, where its group was."""
        node, depth = self.tree.closest(finding.path)
        origin, message = node.origin, finding.message
        if finding.kind == "unknown" and origin.path == finding.path:  # at the top of a file
            if nearest(finding.path[0], [*STAGE_SHAPE.keys(), "stages"]) == "stages":
                message = "unknown key (did you mean stages?)"
        path = (*origin.path, *finding.path[depth:])
        return origin.problem(message, path)


def _stage_problems(drafts: dict[str, _Draft], *, whole: bool) -> list[Problem]:
    """The problems of all stages; what several stages inherit is said once."""
    stages_of: dict[Problem, list[str]] = {}
    facts: dict[str, Facts] = {}
    for name, draft in drafts.items():
        groups = usable_groups(draft.data, draft.findings)
        facts[name] = Facts(name, draft.data, groups, draft.findings, dict(facts), tuple(drafts), draft.tree)
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


def raise_problems(problems: list[Problem], files: Sequence[Path]) -> None:
    """Raise them as someone reads: file by file, top to bottom, the command line last."""
    order = {str(file): place for place, file in enumerate(files)}
    if problems:
        unique = dict.fromkeys(problems)
        raise ConfigErrors(
            sorted(unique, key=lambda one: (order.get(one.file, len(order)), one.line or 0, one.path, one.message))
        )
