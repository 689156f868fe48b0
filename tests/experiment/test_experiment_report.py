"""The report of an experiment: means and deviations of what the folders hold, and what is still missing."""

import csv
import statistics

import pytest

from minillm.experiment.experiment_report import write_experiment_report
from minillm.experiment.jobs import folder_of
from minillm.experiment.results import FAILURE


@pytest.fixture
def report(folders):
    def write(*seeds: int) -> str:
        folders.output.mkdir(exist_ok=True)
        return write_experiment_report(folders.experiment, folders.output, seeds or (1, 2), pictures=False).read_text()

    return write


def line(text: str, name: str) -> list[str]:
    (found,) = [one for one in text.splitlines() if one.startswith(f"| {name} |")]
    return [cell.strip() for cell in found.strip("|").split(" | ")]


def test_means_and_deviations_over_the_seeds_are_those_of_the_values(folders, report):
    values = {1: 2.0, 2: 2.5}
    for seed, value in values.items():
        folders.measured("sft", seed, loss_nats=value, rouge_l=10.0)
        folders.trained("sft", seed, seconds=60.0)
    text = report()
    assert line(text, "sft")[1:] == ["2.25 ± 0.35", "10.0", "200", "2"]
    rows = {row["arm"]: row for row in csv.DictReader((folders.output / "table.csv").open())}
    assert float(rows["sft"]["loss_nats_std"]) == pytest.approx(statistics.stdev(values.values()))
    each = [row for row in csv.DictReader((folders.output / "values.csv").open()) if row["measure"] == "loss_nats"]
    assert {int(row["seed"]): float(row["value"]) for row in each} == values


def test_what_is_missing_is_named_by_arm_and_seed(folders, report):
    folders.measured("sft", 1, loss_nats=2.0)
    text = report()
    assert "**Not there yet:** start (seed 1, 2); sft (seed 2); kd (seed 1, 2); timed (seed 1, 2)." in text
    assert "One seed." in report(1)


def test_a_claim_has_its_verdict_over_the_seeds(folders, report):
    for seed, (start, sft) in {1: (3.0, 2.0), 2: (3.0, 3.5)}.items():
        folders.measured("start", seed, loss_nats=start)
        folders.measured("sft", seed, loss_nats=sft)
    assert line(report(), "Training helps")[2:] == ["2.75 to 3.00", "-0.250 ± 1.1", "**undecided** (1 of 2 seeds)"]
    assert line(report(1), "Training helps")[-1] == "**holds** (1 of 1 seeds)"


def test_a_teacher_of_all_arms_is_one_line(folders, report):
    for seed in (1, 2):
        folders.measured("kd", seed, teacher="t", loss_nats=2.0)
    folders.teacher("t", loss_nats=1.0)
    teacher = line(report(), "teacher")
    assert teacher[1] == "1.00" and teacher[-1] == "1"  # counted once


def test_answers_stand_side_by_side_and_failures_are_told(folders, report):
    folders.measured("sft", 2, loss_nats=2.0, sample="because | it is")
    folders.measured("start", 2, loss_nats=3.0, sample="no")
    folder = folder_of(folders.output, 1, "kd")
    folder.mkdir(parents=True)
    (folder / FAILURE).write_text("the loss is nan")
    text = report()
    assert r"| sft | because \| it is |" in text and "| start | no |" in text
    assert "| **prompt** | Why? |" in text and "- kd, seed 1: the loss is nan" in text


def test_the_report_ends_with_the_command_and_the_keys_in_which_runs_differ(folders, report):
    text = report()
    assert "minillm experiment three.yaml --output out --seeds 2" in text
    assert "`method.name`" in text.partition("## Keys in which the runs differ")[2]
