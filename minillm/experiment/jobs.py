"""The work of an experiment in the order in which it can be done: shared stages, then arms, seed by seed.

OUTPUT/seed-1/warmup/      a shared stage: a run's folder, with its model in final/, or its data in stages/warmup/
OUTPUT/seed-1/kd/          an arm: a run's folder, and evaluation.json once it has been measured
"""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from minillm.config.paths import STAGE
from minillm.experiment.experiment_file import STUDENT, Experiment

FINAL = "final"


@dataclass(frozen=True)
class Job:
    """One arm or shared stage with one seed."""

    name: str
    seed: int
    folder: Path
    result: Path  # the folder of what it leaves: a model, or data for other stages
    trained: bool  # false for an arm that is a model as it is
    measured: bool  # false for a shared stage


def folder_of(output: Path, seed: int, name: str) -> Path:
    """Return the folder of a run."""
    return output / f"seed-{seed}" / name


def result_folder(experiment: Experiment, output: Path, seed: int, name: str) -> Path:
    """Return the folder of what a job leaves: a model, or data where its method takes no step."""
    folder = folder_of(output, seed, name)
    takes_steps = experiment.stage(name).config.method.needs().takes_steps
    return folder / FINAL if takes_steps else folder / "stages" / name


def plan_jobs(experiment: Experiment, output: Path, seeds: Sequence[int], arms: Sequence[str]) -> list[Job]:
    """List the chosen arms after the shared stages and arms that they need, seed by seed: a kill loses one run."""
    needed = _needed(experiment, arms)
    jobs = []
    for seed in seeds:
        for name in [*experiment.shared, *experiment.arms]:
            if name in needed and (not is_seedless(experiment, name) or seed == experiment.config.seeds[0]):
                trained = name not in experiment.as_is
                measured = name in arms and name not in experiment.shared
                result = result_folder(experiment, output, seed, name)
                jobs.append(Job(name, seed, folder_of(output, seed, name), result, trained, measured))
    return jobs


def is_seedless(experiment: Experiment, name: str) -> bool:
    """True for an arm whose model does not depend on the seed, which is measured once."""
    return name in experiment.as_is and not references(experiment, name)


def _needed(experiment: Experiment, arms: Sequence[str]) -> set[str]:
    needed, left = set(), list(arms)
    while left:
        name = left.pop()
        if name not in needed:
            needed.add(name)
            left += references(experiment, name)
    return needed


def references(experiment: Experiment, name: str) -> list[str]:
    """List the stages and arms whose model, data or training time a job takes."""
    if name in experiment.as_is:
        texts: list = [experiment.as_is[name], getattr(experiment.base.config.teacher, "path", None)]
        if texts[0] == STUDENT:
            texts.append(experiment.base.config.student.path)
    else:
        texts = list(stage_references(experiment.stage(name).config).values())
    return [text.removeprefix(STAGE) for text in texts if isinstance(text, str) and text.startswith(STAGE)]


def stage_references(config: BaseModel) -> dict[tuple[str, ...], str]:
    """The keys of a configuration that say stage:NAME, and what they say."""
    found = {}
    for key, value in config:
        if isinstance(value, BaseModel):
            found |= {(key, *path): text for path, text in stage_references(value).items()}
        elif isinstance(value, str) and value.startswith(STAGE):
            found[(key,)] = value
    return found


def command_of(experiment: Experiment, output: Path, seeds: Sequence[int]) -> list[str]:
    """Return the words of the command that does all of the experiment."""
    words = ["minillm", "experiment", str(experiment.file), *experiment.overrides]
    return [*words, "--output", str(output), "--seeds", str(len(seeds))]


def commands(experiment: Experiment, output: Path, seeds: Sequence[int], arms: Sequence[str]) -> Iterator[str]:
    """Write one command per run, for the machines of a cluster; comments say which runs come before which."""
    everything = shlex.join(command_of(experiment, output, seeds))
    jobs = plan_jobs(experiment, output, seeds, arms)
    waves = _waves(experiment, jobs)
    for wave, names in enumerate(waves):
        yield (
            "# these first, all at once"
            if wave == 0 and len(waves) > 1
            else ("# these at once" if wave == 0 else "# when those above are done, these at once")
        )
        for job in jobs:
            if job.name in names:
                yield f"{_launcher(experiment, job)}{everything} --arms {job.name} --seed {job.seed}"
    yield "# in the end, what is left to be measured, and the report"
    yield everything


def _launcher(experiment: Experiment, job: Job) -> str:
    """The launcher before the command of a run of several processes, which trains and measures nothing."""
    several = job.trained and experiment.stage(job.name).config.engine.type != "torch"
    return "torchrun --nproc-per-node $GPUS --no-python " if several else ""


def _waves(experiment: Experiment, jobs: Sequence[Job]) -> list[set[str]]:
    """The names of jobs in waves: each wave needs those before it."""
    names = dict.fromkeys(job.name for job in jobs)
    depth: dict[str, int] = {}
    for name in names:  # what is referred to stands before
        depth[name] = max((depth[other] + 1 for other in references(experiment, name) if other in depth), default=0)
    return [{name for name in names if depth[name] == wave} for wave in range(max(depth.values(), default=-1) + 1)]
