"""The order of the work, and the commands for a cluster."""

from pathlib import Path

from minillm.experiment.experiment_file import load_experiment
from minillm.experiment.jobs import commands, plan_jobs, references


def names(jobs) -> list[tuple[str, int]]:
    return [(job.name, job.seed) for job in jobs]


def test_seed_by_seed_and_what_is_shared_first(write):
    experiment = load_experiment(write())
    jobs = plan_jobs(experiment, Path("out"), [1, 2], experiment.arms)
    assert names(jobs[:5]) == [("warmup", 1), ("start", 1), ("sft", 1), ("kd", 1), ("timed", 1)]
    assert [job.seed for job in jobs] == [1] * 5 + [2] * 5
    assert [(job.trained, job.measured) for job in jobs[:3]] == [(True, False), (False, True), (True, True)]
    assert jobs[2].folder == Path("out/seed-1/sft")


def test_an_arm_brings_what_it_starts_from(write):
    experiment = load_experiment(write())
    assert references(experiment, "timed") == ["warmup", "sft"]
    jobs = plan_jobs(experiment, Path("out"), [2], ["timed"])
    assert names(jobs) == [("warmup", 2), ("sft", 2), ("timed", 2)]
    assert [job.measured for job in jobs] == [False, False, True]
    assert names(plan_jobs(experiment, Path("out"), [1], ["warmup"])) == [("warmup", 1)]


def test_a_model_without_a_seed_is_measured_once(write):
    experiment = load_experiment(write(arms__fresh="student"))
    jobs = plan_jobs(experiment, Path("out"), [1, 2], ["fresh", "start"])
    assert names(jobs) == [("warmup", 1), ("start", 1), ("fresh", 1), ("warmup", 2), ("start", 2)]


def test_commands_come_in_the_order_in_which_they_can_run(write):
    experiment = load_experiment(write(), ["base.train.max_steps=3"])
    lines = list(commands(experiment, Path("out"), [1], experiment.arms))
    start = "minillm experiment three.yaml base.train.max_steps=3 --output out --seeds 1"
    work = [line for line in lines if not line.startswith("#")]
    assert work == [f"{start} --arms {name} --seed 1" for name in ("warmup", "start", "sft", "kd", "timed")] + [start]
    assert [place for place, line in enumerate(lines) if line.startswith("#")] == [0, 2, 6, 8]
