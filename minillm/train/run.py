"""A whole run: its stages in order, where it picks up again, and what it leaves behind."""

import json
import shutil
import signal
import traceback
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import torch
import transformers
import yaml

from minillm import UserError
from minillm.config.loader.run_plan import RunPlan, Stage
from minillm.distributed import collectives, group
from minillm.engine.placement import check_devices
from minillm.planning.adapter_check import check_targets
from minillm.reporting.model_card import write_model_card
from minillm.reporting.report import write_report
from minillm.storage.atomic import clean, remove_folder, write_folder, write_text
from minillm.storage.checkpoint import list_checkpoints, newest_whole
from minillm.storage.environment import ENVIRONMENT, describe_environment, read_start
from minillm.storage.folder_lock import hold_folder
from minillm.storage.manifest import MANIFEST, published_damage, sign
from minillm.storage.metrics_log import MetricsLog, SilentLog
from minillm.train.best_model import FOLDER as BEST
from minillm.train.frozen_weights import BASES
from minillm.train.model_cache import ModelCache
from minillm.train.prepared import has_no_model, is_prepared
from minillm.train.progress import Progress
from minillm.train.resume import check_resume
from minillm.train.stage import StageBuilder
from minillm.train.trainer import TrainingError
from minillm.train.trainer_state import read_trainer_state

MODEL_ONLY = shutil.ignore_patterns("state", MANIFEST)


def run(plan: RunPlan, *, resume: bool, console, cache: ModelCache | None = None) -> Path:
    """Train every stage of the plan; returns the folder final/.

    `cache` holds what an earlier run of this process opened, for runs of engine.type torch that have it in common.

    Raises UserError for what cannot be gone on from or into, TrainingError where the run cannot go on, KeyboardInterrupt after saving on Ctrl-C or SIGTERM.
    """
    output_dir = plan.output_dir
    if all(stage.config.engine.type == "torch" for stage in plan.stages):
        with hold_folder(output_dir, note=console.note):
            return _run(plan, resume=resume, console=console, cache=cache or ModelCache())
    group.join(output_dir)
    with ExitStack() as held:  # by rank 0 for all
        collectives.on_rank_0(lambda: held.enter_context(hold_folder(output_dir, note=console.note)))
        return _run_together(plan, resume=resume, console=console)


def _run_together(plan: RunPlan, *, resume: bool, console) -> Path:
    """`_run` on the ranks of a group that has been joined, and is left at the end."""
    output_dir, cache = plan.output_dir, ModelCache()  # of this run alone: what is sharded goes with the group
    try:
        final = _run(plan, resume=resume, console=console, cache=cache)
        cache.close()
        group.leave()
        return final
    except TrainingError:
        raise
    except Exception as error:
        message = group.lost_rank_behind(error)
        group.record_failure(output_dir, f"{message or ''}\n{traceback.format_exc()}".lstrip())
        if message is None:
            raise
        raise TrainingError(message) from error


def _run(plan: RunPlan, *, resume: bool, console, cache: ModelCache) -> Path:
    output_dir = plan.output_dir
    for stage in plan.stages:
        check_devices(stage.config)
    check_targets(plan)
    checkpoint = collectives.on_rank_0(lambda: _prepare(output_dir, resume, console))
    checkpoint = None if checkpoint is None else Path(checkpoint)
    progress, longer = None, False
    if checkpoint is not None:
        saved = read_trainer_state(checkpoint)
        progress = saved.progress
        longer = check_resume(plan, progress, saved.config)
        console.note(f"going on from {checkpoint.name}: stage {progress.stage}, step {progress.stage_step}")
    started = collectives.on_rank_0(lambda: _started(output_dir, progress, resume))
    if progress is not None:
        progress.started = started
    if collectives.rank() == 0:
        write_text(output_dir / "config.yaml", yaml.safe_dump(plan.document, sort_keys=False, allow_unicode=True))
        environment = {**describe_environment(), "started": started}
        write_text(output_dir / ENVIRONMENT, json.dumps(environment, indent=1))

    transformers.utils.logging.disable_progress_bar()  # one bar at a time: the run's own
    log = SilentLog() if collectives.rank() else MetricsLog(output_dir, plan.stages[0].config.log.report_to)
    log.truncate(progress.log if progress else {})
    builder = StageBuilder(console, output_dir, cache, started=datetime.fromisoformat(started))
    names = [stage.name for stage in plan.stages]
    with log, interruption(console.note) as interrupted:
        for stage in plan.stages:
            if not stage.config.method.needs().takes_steps:
                if not collectives.on_rank_0(lambda stage=stage: is_prepared(stage, output_dir)):
                    builder.prepare(stage, interrupted)
                    collectives.on_rank_0(lambda: str(write_report(output_dir)))
                continue
            if progress and names.index(stage.name) < names.index(progress.stage):
                continue
            resumed = progress is not None and progress.stage == stage.name
            if not resumed:
                progress = _next_progress(progress, stage.name, started)
            if not progress.finished or resumed and longer:
                trainer = builder.trainer(
                    stage,
                    log,
                    progress,
                    interrupted,
                    checkpoint=checkpoint if resumed else None,
                    judge_teacher=_first_with_its_teacher(plan, stage),
                    planned_peak_gib=partial(_planned_peak_gib, plan, stage),
                )
                if resumed:
                    trainer.load(checkpoint)
                if progress.finished and not trainer.done():
                    progress.finished = False
                    collectives.on_rank_0(lambda name=stage.name: _take_back(plan, name))
                # where this student comes straight from an earlier stage, that stage's last evaluation is this one's first
                if not progress.finished:
                    trainer.run(evaluate_first=not _measured_before(plan, stage))
                trainer.close()
                del trainer  # before the next stage loads its student
                checkpoint = output_dir / f"checkpoint-{progress.step}"
            if len(plan.stages) > 1 or stage.name != "main":
                _publish(checkpoint, output_dir / "stages" / stage.name, console.note)
            if stage is not plan.stages[-1]:  # which is described with the run below
                collectives.on_rank_0(lambda: str(write_report(output_dir)))
    final = output_dir / "final"
    if checkpoint is None:  # no stage took a step: the results are in stages/
        console.finish(output_dir)
        return output_dir / "stages"
    _publish(checkpoint, final, console.note)
    collectives.on_rank_0(lambda: _describe(output_dir, final))
    console.finish(output_dir)
    return final


def _started(output_dir: Path, progress: Progress | None, resume: bool) -> str:
    """When the run began, in ISO 8601: chat templates may print it, so that a resumed run reads its data as before."""
    if progress is not None and progress.started is not None:
        return progress.started
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    if not resume:
        return now
    began = read_start(output_dir)  # a run without a checkpoint, or one of a version whose checkpoints do not say it
    return now if began is None else began.isoformat()


def _prepare(output_dir: Path, resume: bool, console) -> str | None:
    """A folder without what a kill left; the checkpoint to go on from.

    Raises UserError where there is nothing to go on from but something to lose: checkpoints of which none is whole, or
    models.
    """
    for folder in (output_dir, output_dir / "stages", output_dir / BASES):
        clean(folder)
    if not resume:
        return None
    checkpoint = newest_whole(output_dir, console.note)
    if checkpoint is not None:
        _tell_of_damage(output_dir, console.note)
        return str(checkpoint)
    left = [str(folder.relative_to(output_dir)) for folder in _models(output_dir)]
    damaged = list_checkpoints(output_dir)
    if left or damaged:
        what = "no checkpoint in it is whole" if damaged else "there is no checkpoint to go on from"
        beside = f" beside {', '.join(left)}" if left else ""
        raise UserError(
            f"{output_dir}: {what}{beside}, and a start from the beginning would overwrite its records. Start in another "
            "output_dir, or delete this one"
        )
    return None


def _models(output_dir: Path) -> list[Path]:
    """The models that stages have left."""
    folders = (output_dir / "final", *sorted(output_dir.glob("stages/*")))
    return [folder for folder in folders if folder.is_dir() and not has_no_model(folder)]


def _tell_of_damage(output_dir: Path, note: Callable[[str], None]) -> None:
    for folder in (output_dir / BEST, *_models(output_dir)):
        damage = published_damage(folder)
        if damage is not None:
            note(f"{folder.relative_to(output_dir)} is not whole ({damage})")


def _describe(output_dir: Path, final: Path) -> None:
    write_model_card(output_dir, final)
    write_report(output_dir)


def _next_progress(before: Progress | None, stage: str, started: str) -> Progress:
    if before is None:
        return Progress(stage, started=started)
    return Progress(
        stage,
        step=before.step,
        stage_seconds=before.stage_seconds,
        stage_configs=before.stage_configs,
        by_length=before.by_length,
        started=started,
    )


def _first_with_its_teacher(plan: RunPlan, stage: Stage) -> bool:
    """True where the teacher's own answers are evaluated in this stage: once a teacher and evaluation."""
    teacher = stage.config.teacher_side
    if teacher is None or not stage.config.eval.teacher or "evaluate" not in teacher.abilities:
        return False

    def key(other: Stage):
        return other.config.teacher_side, other.config.eval

    needs = ((other, other.config.method.needs()) for other in plan.stages)
    # where each model reads its own ids, the evaluation's prompts are in the student's
    measured = (other for other, of_it in needs if of_it.takes_steps and not of_it.other_tokenizer)
    first = next((other for other in measured if key(other) == key(stage)), None)
    return first is not None and first.name == stage.name


def _planned_peak_gib(plan: RunPlan, stage: Stage, device: torch.device) -> float | None:
    from minillm.planning.planner import planned_peak_gib

    return planned_peak_gib(plan, stage, device, world_size=collectives.world_size())


def _measured_before(plan: RunPlan, stage: Stage) -> bool:
    path, config = stage.config.student.path or "", stage.config
    if not path.startswith("stage:") or config.student.init != "pretrained":
        return False
    source = next(other.config for other in plan.stages if other.name == path.removeprefix("stage:"))
    return source.eval == config.eval and source.teacher_side == config.teacher_side


def _take_back(plan: RunPlan, name: str) -> None:
    """The model that a stage left, which lies in its checkpoint as well, is not its last one any more; nor is what later
    stages have had it write."""
    names = [stage.name for stage in plan.stages]
    folders = [plan.output_dir / "final", plan.output_dir / "stages" / name]
    folders += [plan.output_dir / "written" / later for later in names[names.index(name) + 1 :]]
    for folder in folders:
        remove_folder(folder)


def _publish(checkpoint: Path, folder: Path, note: Callable[[str], None]) -> None:
    """Copy a checkpoint's model to `folder`, whole or not at all, and sign it; a whole one that is there already stays."""
    if collectives.on_rank_0(lambda: folder.exists() and published_damage(folder) is None):
        return
    if folder.exists():
        note(f"{folder.name} is written again, from {checkpoint.name}")

    def fill(partial: Path) -> None:
        if collectives.rank() == 0:
            shutil.copytree(checkpoint, partial, ignore=MODEL_ONLY, dirs_exist_ok=True)

    write_folder(folder, fill, sign=sign)


@contextmanager
def interruption(
    note: Callable[[str], None],
    said: str = "stopping after this step, with a checkpoint; once more to stop at once without one",
):
    """Turn the first Ctrl-C or SIGTERM into a wish that the loop grants after its step; the second one is immediate."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        note(said)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
