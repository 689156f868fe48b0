"""Whole runs on generated models: killed at many moments, interrupted, resumed; what they leave behind."""

import itertools
import json
import os
import signal
import traceback
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minillm.cli import main
from minillm.config.loading import load_run
from minillm.config.models import StudentConfig, TeacherConfig
from minillm.rollout import sampling, supported
from minillm.run import run
from minillm.shared import _same_weights
from minillm.trainer import TrainingError


class Silent:
    """A console that remembers its notes."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.fixture(autouse=True)
def one_thread():
    """A forked process has no threads of torch, and the last bits of a sum depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe(tmp_path, small_run) -> Path:
    document = small_run(tmp_path, layers=1)
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}},
        "distil": {
            "teacher": {"path": "stage:teacher"},
            "method": {"name": "minillm", "ppo_epochs": 2},
            "train": {"max_steps": 6},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def train(recipe: Path, *overrides: str, resume: bool = False) -> tuple[Path, Silent]:
    console = Silent()
    return run(load_run([recipe], list(overrides)), resume=resume, console=console), console


def in_a_child(work) -> int:
    """The wait status of a forked process that does `work`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def die_after(events: int) -> None:
    """SIGKILL this process at its n-th event: a decode step, an optimiser step, a file synced, renamed or appended to."""
    from minillm import atomic, metrics
    from minillm.engine.torch import TorchEngine
    from minillm.rollout.decoder import Decoder

    left = [events]

    def counted(function):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for owner, name in (
        (Decoder, "forward"),
        (TorchEngine, "step"),
        (atomic, "sync"),
        (Path, "rename"),
        (Path, "replace"),
        (metrics.MetricsLog, "write"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def without_clock(line: str) -> dict:
    clock = {"seconds", "tokens_per_s", "memory/peak_gib"}
    return {key: value for key, value in json.loads(line).items() if key not in clock and not key.startswith("time/")}


def records(folder: Path) -> list[dict]:
    return [without_clock(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_killed_at_many_moments_the_run_ends_as_an_unbroken_one(recipe, tmp_path):
    final, _ = train(recipe, f"output_dir={tmp_path / 'unbroken'}")
    killed, kills, patience = tmp_path / "run", 0, 3

    def go_on():
        die_after(patience)
        train(recipe, resume=True)

    while os.WIFSIGNALED(status := in_a_child(go_on)):
        kills += 1
        patience += 5  # later each time, so that every part of the run is hit and there is always progress
        assert kills < 60
    assert status == 0 and kills >= 8
    ours, theirs = load_file(final / "model.safetensors"), load_file(killed / "final" / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert records(killed) == records(tmp_path / "unbroken")
    samples = [(folder / "samples.jsonl").read_text() for folder in (killed, tmp_path / "unbroken")]
    assert samples[0] == samples[1]
    assert not list(killed.glob(".checkpoint*"))


def test_ctrl_c_saves_and_the_run_goes_on_from_there(recipe, tmp_path):
    final, _ = train(recipe, f"output_dir={tmp_path / 'unbroken'}")

    def interrupted():
        from minillm.engine.torch import TorchEngine

        original, steps = TorchEngine.step, [0]

        def step(self, micro_batches):
            steps[0] += 1
            if steps[0] == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, micro_batches)

        TorchEngine.step = step
        train(recipe, "save.steps=null")

    status = in_a_child(interrupted)
    assert os.WEXITSTATUS(status) == 130
    assert (tmp_path / "run" / "checkpoint-5" / "manifest.json").exists()
    resumed, console = train(recipe, "save.steps=null", resume=True)
    assert any("step 3" in note for note in console.notes)
    assert records(tmp_path / "run") == records(tmp_path / "unbroken")
    assert (resumed / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()


def test_a_run_leaves_what_it_promises(recipe, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    final, _ = train(recipe)
    folder = tmp_path / "run"
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "env.json", "metrics.jsonl", "samples.jsonl", "report.md", "curves.png", "best"} <= names
    assert {"checkpoint-7", "checkpoint-8", "stages", "final"} <= names
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert (final / "README.md").exists() and not (final / "state").exists()
    kinds = [(record["kind"], record["stage"], record.get("who")) for record in records(folder)]
    assert kinds.count(("eval", "distil", "teacher")) == 1
    assert kinds.count(("train", "distil", None)) == 6


def test_every_step_says_where_its_time_went(recipe, tmp_path):
    train(recipe)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in lines if record["kind"] == "train" and record["stage"] == "distil"]
    for place, record in enumerate(steps):
        parts = {key for key in record if key.startswith("time/")}
        collected = {"time/rollout_s"} if place % 4 == 0 else set()  # two steps an epoch, two epochs
        saved = {"time/saving_s"} if place else set()  # the step before
        assert parts == {"time/scoring_s", "time/update_s"} | collected | saved
    spent = sum(record[key] for record in steps for key in record if key.startswith("time/") and "saving" not in key)
    assert 0 < spent <= steps[-1]["seconds"]
    assert all(record["time/evaluation_s"] > 0 for record in lines if record["kind"] == "eval")
    assert "## Where the time went" in (tmp_path / "run" / "report.md").read_text()


def test_the_last_step_of_a_stage_has_its_planned_memory_where_the_device_counts_allocations(
    recipe, monkeypatch, tmp_path
):
    asked = []

    def planned(plan, stage, device, *, world_size):
        asked.append((stage.name, device.type, world_size))
        if stage.name == "teacher":
            raise NotImplementedError("an operation without a shape")
        return 1.5

    monkeypatch.setattr("minillm.planning.plan.planned_peak_gib", planned)
    train(recipe)
    assert not asked  # the resident memory of a process is not what a plan counts
    monkeypatch.setattr("minillm.trainer.counts_allocations", lambda device: True)
    other = tmp_path / "other"
    _, console = train(recipe, f"output_dir={other}")
    assert asked == [("teacher", "cpu", 1), ("distil", "cpu", 1)]
    assert any("NotImplementedError: an operation without a shape" in note for note in console.notes)
    steps = [record for record in records(other) if record["kind"] == "train"]
    assert [record.get("memory/planned_peak_gib") for record in steps] == [None] * 7 + [1.5]


def test_a_finished_run_resumes_to_itself(recipe, tmp_path):
    final, _ = train(recipe)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes(), (final / "model.safetensors").read_bytes()
    train(recipe, resume=True)
    assert ((tmp_path / "run" / "metrics.jsonl").read_bytes(), (final / "model.safetensors").read_bytes()) == before


def test_the_student_copies_the_teacher_only_where_it_would_read_the_same_weights():
    student, teacher = StudentConfig(path="a/b"), TeacherConfig(path="a/b")
    assert _same_weights(student, teacher)
    for other in ({"revision": "v2"}, {"dtype": "bfloat16"}, {"path": "a/c"}):
        assert not _same_weights(student, teacher.model_copy(update=other)), other


def test_a_prompt_without_a_reference_is_an_error_before_any_step(recipe, tmp_path):
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write('{"prompt": "alone?"}\n')
    with pytest.raises(ValueError, match=r"stage 'teacher': method sft .* 1 of 9 .* number 9"):
        train(recipe)


def test_a_changed_recipe_is_refused_on_resume_and_named(recipe):
    train(recipe)
    with pytest.raises(ValueError, match=r"in train\.learning_rate \([\d.]+ then, 0\.1 now\)\."):
        train(recipe, "train.learning_rate=0.1", resume=True)
    train(recipe, "save.keep=1", resume=True)


def test_without_any_whole_checkpoint_nothing_is_overwritten(recipe, tmp_path):
    train(recipe)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for manifest in (tmp_path / "run").glob("checkpoint-*/manifest.json"):
        manifest.unlink()
    with pytest.raises(ValueError, match="no checkpoint in .* is whole"):
        train(recipe, resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_mistake_in_the_data_can_be_corrected_in_the_same_folder(recipe, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    good = prompts.read_text()
    prompts.write_text(good + "{half")
    command = ["train", str(recipe), "stages.teacher.train.max_steps=1", "stages.distil.train.max_steps=1"]
    assert main(command) == 2
    assert f"{prompts}:9: not JSON" in capsys.readouterr().err
    prompts.write_text(good)
    assert main(command) == 0
    assert main(command) == 2 and "is not empty" in capsys.readouterr().err


def test_a_backend_that_the_device_cannot_run_is_an_error_before_any_step(recipe, tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="engine.backend is triton, which needs a GPU"):
        train(recipe, "engine={type: torch, device: cpu, backend: triton}")
    assert not records(tmp_path / "run")


def test_equal_time_is_that_of_the_stage_it_names(recipe, tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("minillm.trainer.time.perf_counter", lambda: float(next(clock)))  # every step takes a second
    train(recipe, "stages.teacher.train.max_steps=3", "stages.distil.train.max_seconds=stage:teacher",
          "stages.distil.train.max_steps=100")  # fmt: skip
    steps = [record["stage"] for record in records(tmp_path / "run") if record["kind"] == "train"]
    assert steps == ["teacher"] * 3 + ["distil"] * 3


def test_a_stage_ends_with_the_step_that_uses_up_its_tokens(recipe, tmp_path):
    train(recipe, "stages.teacher.train.max_steps=null", "stages.teacher.train.max_student_tokens=60")
    tokens = [record["student_tokens"] for record in records(tmp_path / "run")
              if record["kind"] == "train" and record["stage"] == "teacher"]  # fmt: skip
    assert len(tokens) > 1 and tokens[-2] < 60 <= tokens[-1]


def test_a_loss_that_is_not_finite_stops_with_what_to_look_at(recipe, tmp_path):
    with pytest.raises(TrainingError, match="Prompts of the batch") as error:
        train(recipe, "stages.distil.train.learning_rate=1e30", "stages.distil.train.max_grad_norm=null")
    assert "learning_rate" in str(error.value) and "stage 'distil'" in str(error.value)
    assert list((tmp_path / "run").glob("checkpoint-*"))


def test_cuda_graphs_without_a_gpu_are_an_error_before_any_step(recipe, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ValueError, match="rollout.cuda_graphs is true, but the models are on the cpu"):
        train(recipe, "rollout.cuda_graphs=true")
    assert records(tmp_path / "run") == []


def test_a_run_whose_steps_are_captured_takes_the_same_steps(recipe, tmp_path, monkeypatch):
    """Rollouts and evaluation, with steps that are run again in the place of graphs."""
    train(recipe, f"output_dir={tmp_path / 'plain'}")
    captured = []
    monkeypatch.setattr(supported, "require_gpu", lambda device: None)
    monkeypatch.setattr(sampling, "CudaGraphs", lambda device: lambda step: captured.append(step()) or step)
    train(recipe, "rollout.cuda_graphs=true")
    expected, found = records(tmp_path / "plain"), records(tmp_path / "run")
    assert len(found) == len(expected)
    evaluations = sum(record["kind"] == "eval" for record in found)
    assert len(captured) == 2 + evaluations  # two buffers, each sampled in one call
    for ours, theirs in zip(found, expected, strict=True):
        ours, theirs = (record.get("mean", record) for record in (ours, theirs))  # of an evaluation what it measured
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert ours[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-5)), key
