"""The part of a configuration that an evaluation without training takes: some groups of its last stage."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from minillm.config.checks.facts import Facts
from minillm.config.checks.stage_checks import check_stage
from minillm.config.errors import Finding, Problem
from minillm.config.evaluation import EvalConfig
from minillm.config.loader.drafts import Draft
from minillm.config.loader.run_plan import raise_problems
from minillm.config.loader.stages import load_document, stage_trees
from minillm.config.loader.validation import usable_groups
from minillm.config.models import AnyTeacherConfig, TeachersByConfig, TeacherSide
from minillm.config.rollout import RolloutConfig
from minillm.config.root import STAGE_SHAPE
from minillm.config.shape import KeyPath
from minillm.config.training import DeepSpeedEngine, TorchEngine
from minillm.config.tree import COMMAND_LINE, Node, dotted


@dataclass(frozen=True)
class EvaluationPlan:
    """Everything that an evaluation takes from a configuration."""

    output_dir: Path  # where the models of stage:NAME are
    seed: int
    teacher: TeacherSide | None  # several taken together
    teachers: dict[str, AnyTeacherConfig]
    teachers_by: TeachersByConfig | None
    engine: TorchEngine | DeepSpeedEngine
    rollout: RolloutConfig
    eval: EvalConfig


GROUPS = tuple(field.name for field in fields(EvaluationPlan))
# Keys of these groups that concern training alone.
OF_TRAINING = {("eval", "steps"), ("eval", "metric")} | {
    ("rollout", key) for key in RolloutConfig.model_fields if key != "cuda_graphs"
}


def load_evaluation(
    files: Sequence[Path], overrides: Sequence[str] = (), *, base: dict[str, Any] | None = None
) -> EvaluationPlan:
    """The groups that an evaluation needs, validated and checked. The others may be missing and are not looked at.

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
    problems += _overrides_without_effect(document, trees)
    evaluation = checked_evaluation(tree, problems, name=name, before=[other for other, _ in before], whole=whole)
    raise_problems(problems, files)
    return evaluation


def checked_evaluation(
    tree: Node, problems: list[Problem], *, name: str, before: Sequence[str] = (), whole: bool = True
) -> EvaluationPlan | None:
    """The groups of a stage that an evaluation needs; None where something is wrong with them.

    Args:
        tree: the stage's keys.
        problems: receives what is wrong.
        name: the name of the stage.
        before: the stages before it, whose models are there.
        whole: False where a file could not be read; then what seems to be missing may stand in that file.
    """
    others = set(STAGE_SHAPE.keys()) - set(GROUPS)
    draft = Draft.of(Node({key: node for key, node in tree.value.items() if key not in others}, tree.origin))
    findings = [one for one in draft.findings if one.path[0] not in others and one.path != ("output_dir",)]
    typed = {key: group for key, group in usable_groups(draft.data, findings).items() if key not in others}
    if whole:
        earlier = {other: Facts.unread(other) for other in before}
        facts = Facts(name, draft.data, typed, findings, earlier, all_stages=(*earlier, name), tree=draft.tree)
        findings += check_stage(facts)
    asked = typed.get("eval")
    if asked is not None and not asked.sets and (asked.exposure_bias is not None or not asked.measures_without_sets):
        findings.append(Finding(("eval", "sets"), "missing: held-out prompts to evaluate on", "missing"))
    found = [draft.problem(finding) for finding in findings if whole or finding.kind != "missing"]
    problems += found
    return None if found else EvaluationPlan(**{**typed, "output_dir": Path(typed.get("output_dir", "."))})


def _overrides_without_effect(document: Node, trees: Mapping[str, Node]) -> Iterator[Problem]:
    """Keys of the command line that the evaluation of the last stage does not take."""
    last, tree = next(reversed(trees.items()))
    for path, node in document.leaves():
        if node.origin.file != COMMAND_LINE or not path:
            continue
        stage, key = (path[1], path[2:]) if path[0] == "stages" else (None, path)
        why = _why_without_effect(key, stage, last, tree, node)
        if why is not None:
            yield node.origin.problem(f"has no effect on an evaluation: {why}")


def _why_without_effect(key: KeyPath, stage: str | None, last: str, tree: Node, node: Node) -> str | None:
    if stage not in (None, last):
        return f"it takes the keys of the last stage, {last}"
    if key and key[0] in STAGE_SHAPE.keys() and key[0] not in GROUPS:
        return f"it takes {', '.join(GROUPS)}"
    if key[:2] in OF_TRAINING:
        beside = f"eval.{key[1]}"
        known = key[0] != "eval" and key[1] in EvalConfig.model_fields
        return f"{dotted(key)} is for training" + (f"; write {beside}" if known else "")
    own = tree.at(key)
    if stage is None and own is not node and own is not None:
        return f"stage {last} has its own; write {dotted(own.origin.path)}"
    return None
