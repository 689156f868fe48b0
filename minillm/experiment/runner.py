"""The work that is left of an experiment, one run after the other; the report is written anew after each."""

import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from minillm import UserError
from minillm.config.loader.run_plan import RunPlan, Stage
from minillm.config.paths import STAGE
from minillm.experiment.experiment_file import Experiment
from minillm.experiment.experiment_report import write_experiment_report
from minillm.experiment.jobs import Job, folder_of, plan_jobs, result_folder, stage_references
from minillm.experiment.measuring import Measuring, require_whole
from minillm.experiment.results import FAILURE
from minillm.reporting.console import Console
from minillm.reporting.markdown import duration
from minillm.storage.atomic import write_text
from minillm.storage.folder_lock import FolderInUseError, hold_folder
from minillm.storage.metrics_log import METRICS, read_records
from minillm.train.model_cache import ModelCache
from minillm.train.resume import FREE_ON_RESUME
from minillm.train.run import run
from minillm.train.trainer import TrainingError


class BusyError(TrainingError):
    """A run that another process has in hand."""


def run_experiment(
    experiment: Experiment, output: Path, *, seeds: Sequence[int], arms: Sequence[str], report_seeds: Sequence[int]
) -> list[str]:
    """Train and measure what is not done yet; returns the failures, one line for each.

    Args:
        experiment: what to do.
        output: the experiment's folder.
        seeds: those to work on.
        arms: the arms to work on.
        report_seeds: those that the report is about.

    A run that stops with a TrainingError is recorded, those that need its model are left out, and the others go on.
    Raises KeyboardInterrupt after saving on Ctrl-C or SIGTERM.
    """
    output.mkdir(parents=True, exist_ok=True)
    jobs = plan_jobs(experiment, output, seeds, arms)
    check_finished(experiment, output, jobs)
    cache, failures, began, done = ModelCache(), [], time.monotonic(), 0
    measuring = Measuring(experiment, output, cache)
    todo = [job for job in jobs if not measuring.is_done(job)]
    for place, job in enumerate(todo, 1):
        with Console() as console:
            console.note(f"[{place}/{len(todo)}] {job.name}, seed {job.seed}{_remaining(began, done, len(todo))}")
            try:
                with alone(job, console):
                    if job.trained and not job.result.is_dir():
                        run(plan_of(experiment, output, job), resume=True, console=console, cache=cache)
                    if job.measured:
                        measuring.measure(job, console)
                (job.folder / FAILURE).unlink(missing_ok=True)
            except TrainingError as error:
                failures.append(f"{job.name}, seed {job.seed}: {error}")
                if not isinstance(error, BusyError):
                    write_text(job.folder / FAILURE, f"{error}\n")
                console.note(f"{job.name}, seed {job.seed} has failed: {error}")
            done += 1
        write_experiment_report(experiment, output, report_seeds, pictures=False)
    return failures


def train_together(experiment: Experiment, output: Path, *, seeds: Sequence[int], arms: Sequence[str]) -> None:
    """Train one run as one of several processes that a launcher has started, and measure nothing.

    Raises UserError where there is not exactly one run to train, and TrainingError as `run` does.
    """
    jobs = plan_jobs(experiment, output, seeds, arms)
    left = [job for job in jobs if job.trained and not job.result.is_dir()]
    if len(left) != 1:
        names = ", ".join(f"{job.name} with seed {job.seed}" for job in left) or "none"
        raise UserError(f"a launcher of several processes trains one run at a time; left to train: {names}. Name one "
                         "with --arms and --seed, in the order of --list")  # fmt: skip
    if experiment.stage(left[0].name).config.engine.type == "torch":
        raise UserError(
            "engine.type torch is one process; start it without a launcher of several, or set base.engine.type=deepspeed"
        )
    check_finished(experiment, output, jobs)
    with Console() as console:
        run(plan_of(experiment, output, left[0]), resume=True, console=console)


def check_finished(experiment: Experiment, output: Path, jobs: Sequence[Job]) -> None:
    """Refuse finished runs whose keys are not those of now. Raises UserError, which names the keys."""
    for job in jobs:
        if job.trained and job.result.is_dir():
            before = yaml.safe_load((job.folder / "config.yaml").read_text(encoding="utf-8"))
            now = plan_of(experiment, output, job).document
            changed = sorted(key for key in {*before, *now} - FREE_ON_RESUME if before.get(key) != now.get(key))
            if changed:
                raise UserError(
                    f"{job.folder} was trained with another {', '.join(changed)} than {experiment.file} has now: choose "
                    "another --output, or delete that folder to have it trained anew"
                )


def plan_of(experiment: Experiment, output: Path, job: Job) -> RunPlan:
    """Make the run of one arm or shared stage: its stage with the seed, and with folders for stage:NAME.

    Raises TrainingError where what it starts from is not there.
    """
    config = experiment.stage(job.name).config
    changes = {
        path: _meaning(experiment, output, job, path, text.removeprefix(STAGE))
        for path, text in stage_references(config).items()
    }
    changes |= {("seed",): job.seed, ("output_dir",): str(job.folder)}
    document = copy.deepcopy(experiment.documents[job.name])
    for path, value in changes.items():
        config = _with_value(config, path, value)
        _write(document, path, value)
    # a stage called after the arm: the order of its data is its own, and its records carry its name
    return RunPlan(job.folder, [Stage(job.name, config)], {**document, "stages": {job.name: {}}}, [experiment.file])


def _meaning(experiment: Experiment, output: Path, job: Job, path: tuple[str, ...], name: str) -> str | float:
    """The value that stage:NAME stands for at a key: seconds, the files of data, or the folder of a model."""
    folder = result_folder(experiment, output, job.seed, name)
    if path == ("train", "max_seconds"):
        return _seconds_of(output, job, name, folder)
    if not folder.is_dir():
        raise TrainingError(f"it starts from {name} with seed {job.seed}, which is not there")
    whole = require_whole(folder)
    return str(whole / "*.jsonl*") if path[0] == "data" else str(whole)


def _with_value(config: BaseModel, path: tuple[str, ...], value: Any) -> BaseModel:
    key, *below = path
    new = _with_value(getattr(config, key), tuple(below), value) if below else value
    return config.model_copy(update={key: new})


def _write(document: dict, path: tuple[str, ...], value: Any) -> None:
    """Put a value where a document says stage:NAME, or at its top."""
    *above, key = path
    for one in above:
        document = document.get(one) or {}
    if key in document or not above:
        document[key] = value


def _seconds_of(output: Path, job: Job, name: str, result: Path) -> float:
    """The seconds that the training of another arm took."""
    records = read_records(folder_of(output, job.seed, name) / METRICS)
    records = [record for record in records if record["kind"] == "train"]
    if not records or not result.is_dir():
        raise TrainingError(f"its time is that of {name} with seed {job.seed}, which is not done")
    return records[-1]["seconds"]


@contextmanager
def alone(job: Job, console) -> Iterator[None]:
    """Hold a run for this process alone, to train or to measure it. Raises BusyError in any other."""
    with ExitStack() as held:
        try:
            held.enter_context(hold_folder(job.folder, note=console.note))
        except FolderInUseError as error:
            raise BusyError(str(error)) from None
        yield


def _remaining(began: float, done: int, total: int) -> str:
    if not done:
        return ""
    spent = time.monotonic() - began
    return f" ({duration(spent)} so far, about {duration(spent / done * (total - done))} left)"
