"""The way from files and overrides to a plan of typed stages, or to every problem at once, before any model loads.

files, left to right  ->  then group.key=value  ->  one document  ->  its stages, each merged over the rest
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.config.errors import ConfigErrors, Problem
from minillm.config.loader.drafts import Draft, stage_problems
from minillm.config.loader.root_values import root_problems
from minillm.config.loader.stages import load_document, shared_tree, stage_trees
from minillm.config.paths import expand
from minillm.config.root import StageConfig
from minillm.config.tree import Node


@dataclass(frozen=True)
class Stage:
    """One stage, validated."""

    name: str
    config: StageConfig


@dataclass(frozen=True)
class RunPlan:
    """Everything that a run does."""

    output_dir: Path
    stages: list[Stage]  # in order
    document: dict[str, Any]  # the merged files and overrides, as they were written
    files: list[Path]


def load_run(files: Sequence[Path], overrides: Sequence[str] = ()) -> RunPlan:
    """The plan that files and overrides say: merged, taken apart into stages, validated and checked.

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
    """The stages of a merged document. They mean nothing where something is added to `problems`.

    Args:
        document: as `load_document` returns it.
        problems: receives what is wrong.
        whole: False where a file could not be read; then what seems to be missing may stand in that file.
    """
    drafts = {name: Draft.of(tree) for name, tree in stage_trees(document, problems).items()}
    problems += stage_problems(drafts, whole=whole)
    if whole:
        problems += root_problems(shared_tree(document), drafts)
    return [Stage(name, draft.config) for name, draft in drafts.items()]


def resolved(plan: RunPlan) -> dict[str, Any]:
    """The document with everything that stages inherit and all defaults written out. It loads to the same plan."""
    stages = {stage.name: stage.config.model_dump(mode="json") for stage in plan.stages}
    if not plan.document.get("stages"):
        return next(iter(stages.values()))
    report_to = plan.stages[0].config.log.report_to
    for stage in stages.values():
        del stage["output_dir"], stage["log"]["report_to"]
    return {"output_dir": plan.document["output_dir"], "log": {"report_to": list(report_to)}, "stages": stages}


def raise_problems(problems: list[Problem], files: Sequence[Path]) -> None:
    """Raise ConfigErrors where there are any, in the order of reading: file by file, top to bottom, then the command line."""
    order = {str(file): place for place, file in enumerate(files)}
    if problems:
        unique = dict.fromkeys(problems)
        raise ConfigErrors(
            sorted(unique, key=lambda one: (order.get(one.file, len(order)), one.line or 0, one.path, one.message))
        )
