"""The conditions under which a run may go on from a checkpoint: what of its configuration must be as it was, and what may grow."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from minillm import UserError
from minillm.config.loader.run_plan import RunPlan
from minillm.config.models import ServedTeacherConfig, TeacherConfig, TeachersByConfig
from minillm.config.root import StageConfig
from minillm.config.training import SCHEDULES
from minillm.train.progress import Progress

# Keys that may differ between the run that wrote a checkpoint and the one that goes on from it.
FREE_ON_RESUME = {"output_dir", "save", "log", "eval"}
# Keys of a teacher that say where it is, by its type. They may, too.
PLACES = {"local": TeacherConfig.of_the_place, "served": ServedTeacherConfig.of_the_place}
# Keys of `train` that only say when a stage ends. They may grow.
LIMITS = ("max_steps", "num_train_epochs", "max_seconds", "max_student_tokens")


def check_resume(plan: RunPlan, progress: Progress, saved: dict) -> bool:
    """Return True where the checkpoint's stage is to be longer than it was.

    Raises UserError where it, or a stage before it, differs in anything else.
    """
    stages = {stage.name: stage.config.model_dump(mode="json") for stage in plan.stages}
    if progress.stage not in stages:
        raise UserError(f"the checkpoint is in stage {progress.stage!r}, which this configuration does not have")
    longer = _is_longer(saved["train"], stages[progress.stage]["train"])
    if longer:
        limits = {key: stages[progress.stage]["train"][key] for key in LIMITS}
        saved = {**saved, "train": {**saved["train"], **limits}}
    changed = []
    for name, before in {**progress.stage_configs, progress.stage: saved}.items():
        if name not in stages:
            changed.append(f"stages.{name}, which is over and is not there now")
            continue
        where = f"stages.{name}." if name != progress.stage else ""
        kept = (_kept(one) for one in (before, stages[name]))
        changed += [where + change for change in _changes(*kept)]
    if changed:
        raise UserError(
            f"the configuration differs from the checkpoint's in {'; '.join(changed)}. A resumed run must take the steps "
            "the unbroken one would have taken: undo the change, or start a new run in another output_dir with "
            "student.path at the checkpoint. (What ends a stage may grow, where its schedule does not depend on it.)"
        )
    return longer


def _kept(config: dict) -> dict:
    """The keys of a stage that must be as they were: a teacher may be on another device or server, and weights be
    elsewhere in memory."""
    kept = {key: value for key, value in config.items() if key not in FREE_ON_RESUME}
    if kept.get("rollout"):
        kept["rollout"] = {**kept["rollout"], "shared_coins": _draws_by_coins(config)}
    if kept.get("teacher"):
        kept["teacher"] = _without_place(kept["teacher"])
    if kept.get("teachers"):
        kept["teachers"] = {name: _without_place(teacher) for name, teacher in kept["teachers"].items()}
    if kept.get("teachers_by"):
        by, place = kept["teachers_by"], TeachersByConfig.of_the_place
        kept["teachers_by"] = {key: value for key, value in by.items() if key not in place}
    return kept


def _draws_by_coins(config: dict) -> bool | None:
    """True where mixtures were, or will be, drawn by shared coins; as the key says in a configuration of another version."""
    try:
        stage = StageConfig.model_validate(config)
    except ValidationError:
        return config["rollout"].get("shared_coins")
    return stage.rollout.by_coins and "mixture" in stage.method.needs().samples


def _without_place(teacher: dict) -> dict:
    place = PLACES.get(teacher.get("type", "local"), frozenset())  # a local one is written without its type
    return {key: value for key, value in teacher.items() if key not in place}


def _is_longer(before: dict, now: dict) -> bool:
    """True where limits of `train` grew or went, none came or shrank, and the steps so far would have been the same."""
    pairs = [(before.get(key), now[key]) for key in LIMITS if before.get(key) != now[key]]
    grew = all(
        then is not None and (later is None or _is_number(then, later) and later > then) for then, later in pairs
    )
    return bool(pairs) and grew and not SCHEDULES[now["lr_scheduler_type"]].counts_steps


def _is_number(*values: Any) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _changes(before: Any, now: Any, key: str = "") -> Iterator[str]:
    """`train.learning_rate (0.001 then, 0.0005 now)` of every value that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted({*before, *now}):
            yield from _changes(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
    elif before != now:
        yield f"{key} ({json.dumps(before)} then, {json.dumps(now)} now)"
