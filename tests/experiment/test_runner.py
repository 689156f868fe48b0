"""Whole experiments on tiny models: everything once, killed and gone on with, failures that stop one arm alone."""

import csv
import json
import os
from pathlib import Path

import pytest
import yaml

from minillm.cli.main import main
from minillm.experiment import runner
from minillm.experiment.experiment_file import load_experiment
from minillm.experiment.experiment_report import write_experiment_report
from minillm.experiment.jobs import commands
from minillm.models.saving import save_model
from minillm.storage.metrics_log import read_records
from tests.conftest import tiny_llama
from tests.experiment.conftest import START
from tests.other_tokenizer import small_bpe
from tests.runs import Silent, in_a_child


def do(*arguments: str) -> int:
    return main(["experiment", *arguments])


@pytest.fixture
def runs(monkeypatch) -> list[tuple[str, int]]:
    """(arm, seed) of every run that was started."""
    started, real = [], runner.run

    def spy(plan, **options):
        name = plan.stages[0].name
        started.append((name, plan.stages[0].config.seed))
        return real(plan, **options)

    monkeypatch.setattr(runner, "run", spy)
    return started


def test_everything_is_done_once_and_written_down(write, runs, capsys):
    name = write()
    assert do(name) == 0
    assert runs == [(arm, seed) for seed in (1, 2) for arm in ("warmup", "sft", "kd", "timed")]
    output = Path("out")
    report = (output / "report.md").read_text()
    assert "# Three arms" in report and "Not there yet" not in report and "## Claims" in report
    rows = {row["arm"]: row for row in csv.DictReader((output / "table.csv").open())}
    assert list(rows) == ["start", "sft", "kd", "timed", "teacher"]
    values = [row for row in csv.DictReader((output / "values.csv").open()) if row["arm"] == "sft"]
    losses = [float(row["value"]) for row in values if row["measure"] == "loss_nats"]
    assert len(losses) == 2 and float(rows["sft"]["loss_nats"]) == pytest.approx(sum(losses) / 2)
    tokens = [float(row["value"]) for row in values if row["measure"] == "student_tokens"]
    assert all(20 <= value < 40 for value in tokens) and rows["start"]["student_tokens"] == ""
    evaluation = json.loads((output / "seed-1" / "kd" / "evaluation.json").read_text())
    assert evaluation["arm"] == "kd" and "reverse_kl_nats" in evaluation["mean"] and evaluation["teacher"]
    capsys.readouterr()

    assert do(name) == 0 and len(runs) == 8, "what is done is not done again"
    (output / "seed-2" / "kd" / "evaluation.json").unlink()
    assert do(name) == 0 and len(runs) == 8
    assert (output / "seed-2" / "kd" / "evaluation.json").is_file()


def test_runs_of_one_seed_start_from_one_student(write, runs):
    do(write(), "--arms", "kd,sft", "--seeds", "1")
    assert runs == [("warmup", 1), ("sft", 1), ("kd", 1)]
    for arm in ("sft", "kd"):
        config = yaml.safe_load(Path(f"out/seed-1/{arm}/config.yaml").read_text())
        assert (config["seed"], config["student"]["path"]) == (1, "out/seed-1/warmup/final")
        assert list(config["stages"]) == [arm]
        assert {record["stage"] for record in read_records(Path(f"out/seed-1/{arm}/metrics.jsonl"))} == {arm}
    assert config["teacher"]["path"] == "out/seed-1/warmup/final"


def test_an_arm_may_have_the_time_of_another(write):
    do(write(), "--arms", "timed", "--seeds", "1")
    seconds = read_records(Path("out/seed-1/sft/metrics.jsonl"))[-1]["seconds"]
    config = yaml.safe_load(Path("out/seed-1/timed/config.yaml").read_text())
    assert config["train"]["max_seconds"] == pytest.approx(seconds)


def test_an_arm_reads_the_data_that_a_stage_without_steps_has_left(write, folder):
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"text": f"text {n} of some length"}) + "\n" for n in range(12))
    )
    read = {"prompts": None, "corpus": {"path": "corpus.jsonl", "block_size": 8}}
    file = write(
        shared__choose={
            "data": read,
            "teacher": {"path": "stage:warmup"},
            "method": {"name": "miniplm", "reference": "stage:warmup", "ratio": 0.25},
        },
        arms={"lm": {"data": {**read, "corpus": {**read["corpus"], "path": "stage:choose"}}, "method": {"name": "lm"}}},
        claims=[],
    )
    assert do(file, "--seeds", "1") == 0
    (chosen,) = Path("out/seed-1/choose/stages/choose").glob("*.jsonl*")
    config = yaml.safe_load(Path("out/seed-1/lm/config.yaml").read_text())
    assert [Path(path) for path in Path().glob(config["data"]["corpus"]["path"])] == [chosen]
    before = chosen.stat().st_mtime_ns
    assert do(file, "--seeds", "1") == 0 and chosen.stat().st_mtime_ns == before
    waves = [line for line in _listed(file) if line.startswith("#")]
    assert waves[0] == "# these first, all at once" and len(waves) == 4


def test_an_arm_whose_teacher_cannot_read_answers_is_measured_beside_that_of_base(write, folder):
    assert do(write(), "--arms", "warmup", "--seeds", "1", "--output", "before") == 0
    file = write(
        base__teacher={"path": "before/seed-1/warmup/final"},
        shared__cache={"method": {"name": "cache", "texts": ["references"], "dtype": "float32"}},
        arms={
            "kd": {**START, "method": {"name": "kd"}},
            "cached": {**START, "teacher": {"type": "cached", "path": "stage:cache"}, "method": {"name": "kd"}},
        },
        measures=["reverse_kl_nats", "tokens_per_second"],
        claims=[],
    )
    assert do(file, "--seeds", "1") == 0
    here, elsewhere = (json.loads(Path(f"out/seed-1/{arm}/evaluation.json").read_text()) for arm in ("kd", "cached"))
    assert elsewhere["teacher"] == here["teacher"] and elsewhere["mean"]["reverse_kl_nats"] > 0
    assert float(next(csv.DictReader(Path("out/table.csv").open()))["tokens_per_second"]) > 0


def test_an_arm_whose_teacher_has_another_tokenizer_is_measured_without_it(write, folder):
    """And that teacher, as an arm, on the same texts in its own tokens."""
    tokenizer = small_bpe()
    save_model(tiny_llama(vocab_size=len(tokenizer), layers=1), tokenizer, folder / "other")
    file = write(
        arms={
            "sft": {**START, "train": {"max_steps": 1}},
            "uld": {**START, "teacher": {"path": "other"}, "method": {"name": "uld"}},
            "other": "other",
        },
        evaluation__bits_per_byte=True,
        measures=["loss_bits_per_byte", "loss_nats"],
        claims=[],
    )
    assert do(file, "--seeds", "1") == 0
    found = {arm: json.loads(Path(f"out/seed-1/{arm}/evaluation.json").read_text()) for arm in ("sft", "uld", "other")}
    for one in found.values():
        assert one["teacher"] is None and "reverse_kl_nats" not in one["mean"]
    bits, nats = ({arm: one["mean"][key] for arm, one in found.items()} for key in ("loss_bits_per_byte", "loss_nats"))
    assert bits["uld"] / nats["uld"] == pytest.approx(bits["sft"] / nats["sft"])  # the same tokens of the same bytes
    assert bits["other"] / nats["other"] != pytest.approx(bits["sft"] / nats["sft"])
    assert not Path("out/teachers").exists()


def _listed(file: str) -> list[str]:
    experiment = load_experiment(file)
    return list(commands(experiment, Path("out"), [1], list(experiment.config.arms)))


def test_an_interrupted_arm_goes_on_from_its_checkpoint(write, monkeypatch):
    from minillm.train.trainer import StageTrainer

    real, taken = StageTrainer._step, []

    def stop_once(self):
        if len(taken) == 5:  # two steps of the warm-up, three of the arm
            taken.append(None)
            raise KeyboardInterrupt
        taken.append((self.name, self.progress.stage_step))
        return real(self)

    monkeypatch.setattr(StageTrainer, "_step", stop_once)
    name = write(arms={"sft": {"train": {"max_steps": 5}}, "start": "stage:warmup"})
    assert do(name, "--seeds", "1", "--arms", "start,sft") == 130
    assert do(name, "--seeds", "1", "--arms", "start,sft") == 0
    steps = [entry[1] for entry in taken if entry and entry[0] == "sft"]
    assert steps == [0, 1, 2, 3, 4]


def test_a_run_that_stops_is_written_down_and_the_others_go_on(write, capsys):
    name = write(
        shared={"warmup": {}, "broken": {"train": {"learning_rate": 1e30, "max_grad_norm": None, "max_steps": 9}}},
        arms__after={"student": {"path": "stage:broken", "init": "pretrained", "config": None}},
    )
    assert do(name, "--seeds", "1", "--arms", "after,sft") == 1
    error = capsys.readouterr().err
    assert "broken, seed 1" in error and "after, seed 1: it starts from broken" in error
    report = Path("out/report.md").read_text()
    assert "## Runs that stopped" in report and "broken, seed 1" in report
    assert Path("out/seed-1/sft/evaluation.json").is_file()


def test_a_finished_run_with_other_keys_is_not_taken_for_this_one(write, capsys):
    do(write(), "--arms", "sft", "--seeds", "1")
    assert do("three.yaml", "arms.sft.train.learning_rate=0.5", "--arms", "sft", "--seeds", "1") == 2
    assert "was trained with another train" in capsys.readouterr().err
    assert do("three.yaml", "evaluation.max_new_tokens=3", "--arms", "sft", "--seeds", "1") == 0


def test_two_processes_do_not_work_on_one_run(write, capsys):
    experiment = load_experiment(write())
    job = runner.plan_jobs(experiment, Path("out"), [1], ["warmup"])[0]

    def second_process() -> None:
        assert do("three.yaml", "--arms", "warmup", "--seed", "1") == 1
        assert f"warmup, seed 1: {job.folder} is in use: process {os.getppid()} on" in capsys.readouterr().err

    with runner.alone(job, Silent()):
        assert in_a_child(second_process) == 0
    assert not (job.folder / "failure.txt").exists()


def test_a_damaged_model_is_neither_started_from_nor_measured(write, capsys):
    name = write()
    assert do(name, "--arms", "sft", "--seeds", "1") == 0
    weights = Path("out/seed-1/warmup/final/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert do(name, "--arms", "start,kd", "--seeds", "1") == 1
    errors = capsys.readouterr().err
    for arm in ("start", "kd"):
        assert f"{arm}, seed 1: {weights.parent} is not whole (model.safetensors was altered)" in errors


def test_processes_of_a_launcher_train_one_run_together(write, monkeypatch, capsys):
    name, started = write(), []
    monkeypatch.setattr("minillm.cli.experiment.launched_size", lambda: 2)
    monkeypatch.setattr(runner, "run", lambda plan, **options: started.append((plan.stages[0].name, plan.output_dir)))
    assert do(name) == 2
    assert "left to train: warmup with seed 1, sft with seed 1" in capsys.readouterr().err
    assert do(name, "--arms", "warmup", "--seed", "2") == 2
    assert "engine.type torch is one process" in capsys.readouterr().err and not started
    pytest.importorskip("deepspeed")
    assert do(name, "base.engine={type: deepspeed, stage: 1}", "--arms", "warmup", "--seed", "2") == 0
    assert started == [("warmup", Path("out/seed-2/warmup"))]


def test_a_report_of_nothing_and_of_the_list(write, capsys):
    experiment = load_experiment(write())
    Path("new").mkdir()
    text = write_experiment_report(experiment, Path("new"), [1]).read_text()
    assert "Nothing has been measured yet" in text and "**Not there yet:** start (seed 1)" in text
    assert do("three.yaml", "--report") == 2 and "out: no such folder" in capsys.readouterr().err
    assert do("three.yaml", "--report", "--output", "new") == 0 and capsys.readouterr().out == "new/report.md\n"
    assert do("three.yaml", "--list") == 0
    assert "--arms kd --seed 2" in capsys.readouterr().out
    assert do("three.yaml", "--arms", "nobody") == 2
