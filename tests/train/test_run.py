"""Whole runs on generated models: what they leave behind, where they end, and what stops them."""

import itertools
import json
import time
from pathlib import Path

import pytest
import torch

from minillm.cli.main import main
from minillm.config.loader.run_plan import RunPlan, Stage
from minillm.config.root import StageConfig
from minillm.models.tokenizers import byte_tokenizer
from minillm.rollout.local import graph_preconditions, local_rollouts
from minillm.storage.manifest import MANIFEST
from minillm.teachers.preflight import PreflightError
from minillm.train.progress import Progress
from minillm.train.run import _first_with_its_teacher, _measured_before, _next_progress
from minillm.train.trainer import TrainingError
from tests.runs import records, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_leaves_what_it_promises(two_stages, tmp_path, picture):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final, _ = train(two_stages)
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "samples.jsonl", "report.md", "curves.png", "best"} <= names
    assert {"checkpoint-7", "checkpoint-8", "stages", "final"} <= names
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert "minillm" in (final / "README.md").read_text() and not (final / "state").exists()
    kinds = [(record["kind"], record["stage"], record.get("who")) for record in records(folder)]
    assert kinds.count(("eval", "distil", "teacher")) == 1
    assert kinds.count(("eval", "distil", "student")) == 4, "before the first step, and after every second one"


def test_every_step_says_where_its_time_went(two_stages, tmp_path):
    started = time.perf_counter()
    train(two_stages)
    whole = time.perf_counter() - started
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in lines if record["kind"] == "train" and record["stage"] == "distil"]
    for place, record in enumerate(steps):
        parts = {key for key in record if key.startswith("time/")}
        collected = {"time/rollout_s"} if place % 4 == 0 else set()  # two steps an epoch, two epochs
        saved = {"time/saving_s"} if place else set()  # the step before
        assert parts == {"time/scoring_s", "time/update_s"} | collected | saved
    spent = sum(record[key] for record in steps for key in record if key.startswith("time/") and "saving" not in key)
    assert 0 < spent <= steps[-1]["seconds"]
    assert all(0 < record["time/evaluation_s"] < whole for record in lines if record["kind"] == "eval")
    assert "## Where the time went" in (tmp_path / "run" / "report.md").read_text()


def test_the_last_step_of_a_stage_has_its_planned_memory_where_the_device_counts_allocations(
    two_stages, monkeypatch, tmp_path
):
    asked = []

    def planned(plan, stage, device, *, world_size):
        asked.append((stage.name, device.type, world_size))
        if stage.name == "teacher":
            raise NotImplementedError("an operation without a shape")
        return 1.5

    monkeypatch.setattr("minillm.planning.planner.planned_peak_gib", planned)
    train(two_stages)
    assert not asked  # the resident memory of a process is not what a plan counts
    monkeypatch.setattr("minillm.train.trainer.counts_allocations", lambda device: True)
    other = tmp_path / "other"
    _, console = train(two_stages, f"output_dir={other}")
    assert asked == [("teacher", "cpu", 1), ("distil", "cpu", 1)]
    assert any("NotImplementedError: an operation without a shape" in note for note in console.notes)
    steps = [record for record in records(other) if record["kind"] == "train"]
    assert [record.get("memory/planned_peak_gib") for record in steps] == [None] * 7 + [1.5]


def test_a_prompt_without_a_reference_is_an_error_before_any_step(two_stages, tmp_path):
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "alone?"}\n')
    with pytest.raises(ValueError, match=r"stage 'teacher': method sft .* 1 of 9 .* number 9"):
        train(two_stages)


def test_a_mistake_in_the_data_can_be_corrected_in_the_same_folder(two_stages, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    good = prompts.read_text()
    prompts.write_text(good + "{half")
    command = ["train", str(two_stages), "stages.teacher.train.max_steps=1", "stages.distil.train.max_steps=1"]
    assert main(command) == 2
    assert f"{prompts}:9: not JSON" in capsys.readouterr().err
    prompts.write_text(good)
    assert main(command) == 0
    assert main(command) == 2 and "is not empty" in capsys.readouterr().err


def test_a_backend_that_the_device_cannot_run_is_an_error_before_any_step(two_stages, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="engine.backend is triton, which needs a GPU"):
        train(two_stages, "engine={type: torch, device: cpu, backend: triton}")
    assert not records(tmp_path / "run")


def test_equal_time_is_that_of_the_stage_it_names(two_stages, tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(
        "minillm.train.trainer.time.perf_counter", lambda: float(next(clock))
    )  # every step takes a second
    train(two_stages, "stages.teacher.train.max_steps=3", "stages.distil.train.max_seconds=stage:teacher",
          "stages.distil.train.max_steps=100")  # fmt: skip
    steps = [record["stage"] for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert steps == ["teacher"] * 3 + ["distil"] * 3


def test_a_stage_ends_with_the_step_that_uses_up_its_tokens(two_stages, tmp_path):
    train(two_stages, "stages.teacher.train.max_steps=null", "stages.teacher.train.max_student_tokens=60")
    tokens = [record["student_tokens"] for record in records(tmp_path / "run")
              if record["kind"] == "train" and record["stage"] == "teacher"]  # fmt: skip
    assert len(tokens) > 1 and tokens[-2] < 60 <= tokens[-1]


def test_a_loss_that_is_not_finite_stops_with_what_to_look_at(two_stages, tmp_path):
    with pytest.raises(TrainingError, match="The prompts of the batch") as error:
        train(two_stages, "stages.distil.train.learning_rate=1e30", "stages.distil.train.max_grad_norm=null")
    assert "learning_rate" in str(error.value) and "stage 'distil'" in str(error.value)
    assert list((tmp_path / "run").glob("checkpoint-*"))


def test_cuda_graphs_without_a_gpu_are_an_error_before_any_step(two_stages, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match="rollout.cuda_graphs is true, but the models are on the cpu"):
        train(two_stages, "rollout.cuda_graphs=true")
    assert records(tmp_path / "run") == []


def test_a_run_whose_steps_are_captured_takes_the_same_steps(two_stages, tmp_path, monkeypatch):
    """Rollouts and evaluation, with steps that are run again in the place of graphs."""
    train(two_stages, "rollout.shared_coins=false", f"output_dir={tmp_path / 'plain'}")
    captured = []
    monkeypatch.setattr(graph_preconditions, "require_gpu", lambda device: None)
    monkeypatch.setattr(local_rollouts, "CudaGraphs", lambda device: lambda step: captured.append(step()) or step)
    train(two_stages, "rollout.cuda_graphs=true")
    expected, found = records(tmp_path / "plain"), records(tmp_path / "run")
    assert len(found) == len(expected)
    evaluations = sum(record["kind"] == "eval" for record in found)
    assert len(captured) == 2 + evaluations  # two buffers, each sampled in one call
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = (record.get("mean", record) for record in (ours, theirs))  # of an evaluation what it measured
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-5)), key


def test_two_tokenizers_are_an_error_before_a_model_is_read(two_stages, tmp_path, monkeypatch):
    train(two_stages, "stages.distil.train.max_steps=1")
    taught = tmp_path / "run" / "stages" / "teacher"
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<another>"})
    tokenizer.save_pretrained(taught)
    (taught / MANIFEST).unlink()
    monkeypatch.setattr("minillm.teachers.open.load_teacher", lambda *args, **kwargs: pytest.fail("a model was read"))
    keys = ("stages.teacher=null", f"stages.distil.teacher.path={taught}", f"output_dir={tmp_path / 'other'}")
    with pytest.raises(PreflightError, match="student and teacher have different tokenizers"):
        train(two_stages, *keys)


def test_a_warm_up_that_outlasts_its_stage_is_said(two_stages):
    _, console = train(two_stages, "stages.distil.train.warmup_steps=12")
    (said,) = (note for note in console.notes if "warmup_steps" in note)
    assert "is 12, but stage 'distil' has 6 steps" in said and "42% of train.learning_rate" in said


def plan_of(**stages) -> RunPlan:
    """A plan of stages by name; their groups are those of the configuration."""
    root = {"output_dir": "unused", "student": {"path": "unused"}, "method": {"name": "sft"}, "train": {"max_steps": 1}}
    return RunPlan(
        Path("unused"), [Stage(name, StageConfig(**{**root, **one})) for name, one in stages.items()], {}, []
    )


def test_a_teacher_is_evaluated_once_in_the_first_stage_that_measures_against_it():
    one, other = {"path": "org/one"}, {"path": "org/other"}
    longer = {"max_new_tokens": 7}
    plan = plan_of(
        alone={},
        first={"teacher": one},
        second={"teacher": one},
        third={"teacher": other},
        fourth={"teacher": one, "eval": longer},
        unmeasured={"teacher": {"path": "org/third"}, "eval": {"teacher": False}},
    )
    judged = [stage.name for stage in plan.stages if _first_with_its_teacher(plan, stage)]
    assert judged == ["first", "third", "fourth"]


@pytest.mark.parametrize(
    "change, measured",
    [
        ({}, True),
        ({"student": {"path": "org/one"}}, False),
        ({"student": {"path": "stage:warmup", "init": "prune", "layers": [0]}}, False),
        ({"eval": {"max_new_tokens": 7}}, False),
        ({"teacher": {"path": "org/one"}}, False),
    ],
)
def test_a_student_that_comes_from_a_stage_was_measured_at_its_end(change, measured):
    plan = plan_of(
        other={"eval": {"max_new_tokens": 9}}, warmup={}, distil={"student": {"path": "stage:warmup"}, **change}
    )
    assert _measured_before(plan, plan.stages[-1]) is measured


def test_a_stage_begins_where_the_one_before_it_ended():
    day = "2026-02-03T04:05:06+00:00"
    assert _next_progress(None, "warmup", day) == Progress("warmup", started=day)
    before = Progress("warmup", step=5, stage_step=5, draw=3, seconds=2.0, student_tokens=9, finished=True)
    before.stage_seconds, before.stage_configs = {"warmup": 2.0}, {"warmup": {"seed": 1}}
    assert _next_progress(before, "distil", day) == Progress(
        "distil", step=5, stage_seconds={"warmup": 2.0}, stage_configs={"warmup": {"seed": 1}}, started=day
    )
