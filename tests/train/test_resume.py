"""Runs that end early or go on: killed at many moments, interrupted, changed, made longer."""

import json
import os
import shutil
import signal
from datetime import datetime

import pytest
import torch
from safetensors.torch import load_file

from minillm import UserError
from minillm.models import tokenizers
from minillm.train.trainer_state import read_trainer_state
from tests.runs import die_after, in_a_child, records, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_killed_at_many_moments_the_run_ends_as_an_unbroken_one(two_stages, tmp_path):
    final, _ = train(two_stages, f"output_dir={tmp_path / 'unbroken'}")
    killed, kills, patience = tmp_path / "run", 0, 3

    def go_on():
        die_after(patience)
        train(two_stages, resume=True)

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


def test_mixtures_by_shared_coins_go_on_as_they_would_have(two_stages, tmp_path):
    coins = "stages.distil.rollout.shared_coins=true"
    final, _ = train(two_stages, coins, f"output_dir={tmp_path / 'unbroken'}")
    killed = tmp_path / "run"

    def killed_there():
        die_after(70)
        train(two_stages, coins)

    assert os.WIFSIGNALED(in_a_child(killed_there))
    assert 0 < len(records(killed)) < len(records(tmp_path / "unbroken"))
    resumed, _ = train(two_stages, coins, resume=True)
    assert records(killed) == records(tmp_path / "unbroken")
    assert (resumed / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()


def test_ctrl_c_saves_and_the_run_goes_on_from_there(two_stages, tmp_path):
    final, _ = train(two_stages, f"output_dir={tmp_path / 'unbroken'}")

    def interrupted():
        from minillm.engine.torch import TorchEngine

        original, steps = TorchEngine.step, [0]

        def step(self, micro_batches):
            steps[0] += 1
            if steps[0] == 5:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, micro_batches)

        TorchEngine.step = step
        train(two_stages, "save.steps=null")

    status = in_a_child(interrupted)
    assert os.WEXITSTATUS(status) == 130
    assert (tmp_path / "run" / "checkpoint-5" / "manifest.json").exists()
    resumed, console = train(two_stages, "save.steps=null", resume=True)
    assert any("step 3" in note for note in console.notes)
    assert records(tmp_path / "run") == records(tmp_path / "unbroken")
    assert (resumed / "model.safetensors").read_bytes() == (final / "model.safetensors").read_bytes()


def test_a_template_that_prints_the_time_prints_that_of_the_runs_start(two_stages, tmp_path, monkeypatch):
    """Also where the run goes on another day, before its first checkpoint or after it."""
    dated = "{{ strftime_now('%d %b %Y') }}\n" + tokenizers.BYTE_TEMPLATE
    monkeypatch.setattr(tokenizers, "BYTE_TEMPLATE", dated)
    options = (
        "data.prompts.template=chat",
        "data.prompts.max_prompt_length=56",
        "save.steps=2",
        "stages.distil.method={name: seqkd}",
    )

    def on(day: int, *overrides, **kind):
        clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, tz=None: datetime(2026, 2, day, 12))})
        monkeypatch.setattr("minillm.train.run.datetime", clock)
        return train(two_stages, *options, *overrides, **kind)

    (whole, _), (other, _) = (on(day, f"output_dir={tmp_path / f'day-{day}'}") for day in (3, 4))
    assert records(whole.parent) != records(other.parent), "the day is in the prompts"
    killed = tmp_path / "run"
    for day, events in ((3, 12), (4, 60), (5, 60)):  # before the first checkpoint, in the first stage, in the second

        def killed_there(day=day, events=events):
            die_after(events)
            on(day, resume=day > 3)

        assert os.WIFSIGNALED(in_a_child(killed_there))
    assert list(killed.glob("checkpoint-*")) and not (killed / "final").exists()
    final, _ = on(6, resume=True)
    assert records(killed) == records(whole.parent)
    assert (final / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert json.loads((killed / "env.json").read_text())["started"].startswith("2026-02-03")


def test_a_finished_run_resumes_to_itself(two_stages, tmp_path):
    final, _ = train(two_stages)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes(), (final / "model.safetensors").read_bytes()
    train(two_stages, resume=True)
    assert ((tmp_path / "run" / "metrics.jsonl").read_bytes(), (final / "model.safetensors").read_bytes()) == before


def test_mixtures_are_drawn_on_as_they_began(two_stages):
    """By default today's way; a run from before, or one that chose the other, is not gone on from by it."""
    train(two_stages, "stages.distil.rollout.shared_coins=false")
    with pytest.raises(UserError, match=r"rollout\.shared_coins \(false then, true now\)"):
        train(two_stages, resume=True)
    train(two_stages, "stages.distil.rollout.shared_coins=false", resume=True)
    checkpoint = max((two_stages.parent / "run").glob("checkpoint-*"))
    state = json.loads((checkpoint / "state/trainer.json").read_text())
    del state["config"]["rollout"]["shared_coins"]  # as before the key
    (checkpoint / "state/trainer.json").write_text(json.dumps(state))
    assert read_trainer_state(checkpoint).config["rollout"]["shared_coins"] is False


def test_a_changed_recipe_is_refused_on_resume_and_named(two_stages):
    train(two_stages)
    with pytest.raises(ValueError, match=r"; train\.learning_rate \([\d.]+ then, 0\.1 now\)\."):
        train(two_stages, "train.learning_rate=0.1", resume=True)
    train(two_stages, "save.keep=1", resume=True)


def test_without_any_whole_checkpoint_nothing_is_overwritten(two_stages, tmp_path):
    train(two_stages)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for manifest in (tmp_path / "run").glob("checkpoint-*/manifest.json"):
        manifest.unlink()
    with pytest.raises(ValueError, match="no checkpoint in it is whole"):
        train(two_stages, resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_models_without_a_checkpoint_are_not_trained_over(two_stages, tmp_path):
    train(two_stages)
    left = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="no checkpoint to go on from beside final, stages/distil, stages/teacher"):
        train(two_stages, "stages.distil.train.max_steps=9", resume=True)
    kept = {path: content for path, content in left.items() if "checkpoint-" not in str(path)}
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_best_model_by_another_measure_is_not_compared_with(two_stages, tmp_path):
    def best() -> dict:
        newest = max((tmp_path / "run").glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
        return json.loads((newest / "state" / "trainer.json").read_text())["progress"]["best"]

    def train_on(*overrides: str) -> list[str]:
        _, console = train(two_stages, *overrides, resume=True)
        return [note for note in console.notes if "best/ is replaced" in note]

    train(two_stages, "stages.distil.train.max_steps=3")
    assert best()["metric"] == "rouge_l"
    assert not train_on("stages.distil.train.max_steps=4", "eval.steps=1")
    assert len(train_on("stages.distil.train.max_steps=5", "eval.steps=1", "eval.metric=loss_nats")) == 1
    assert (best()["metric"], best()["step"]) == ("loss_nats", 7)


def test_a_run_made_longer_takes_the_steps_of_one_that_was_as_long_from_the_start(two_stages, tmp_path):
    """From a finished run, whose last step was in the middle of a buffer."""
    long = "stages.distil.train.max_steps=9"
    expected, _ = train(two_stages, long, f"output_dir={tmp_path / 'unbroken'}")
    steps = [record for record in records(tmp_path / "unbroken") if record["kind"] == "train"]
    short, _ = train(two_stages, "stages.distil.train.max_steps=5")
    before = (short / "model.safetensors").read_bytes()
    final, console = train(two_stages, long, resume=True)
    assert any("stage distil, step 5" in note for note in console.notes)
    assert before != (final / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert (tmp_path / "run" / "stages" / "distil" / "model.safetensors").read_bytes() != before
    assert [record for record in records(tmp_path / "run") if record["kind"] == "train"] == steps
    with pytest.raises(ValueError, match=r"train\.max_steps \(9 then, 4 now\).*What ends a stage may grow"):
        train(two_stages, "stages.distil.train.max_steps=4", resume=True)


def test_a_schedule_that_was_laid_out_for_its_length_keeps_it(two_stages):
    schedule = "train.lr_scheduler_type=cosine"
    train(two_stages, schedule)
    with pytest.raises(ValueError, match=r"train\.max_steps \(6 then, 9 now\)"):
        train(two_stages, schedule, "stages.distil.train.max_steps=9", resume=True)


def test_a_stage_that_is_over_keeps_its_length(two_stages):
    """Its student is where the next one began."""
    train(two_stages)
    with pytest.raises(ValueError, match=r"stages\.teacher\.train\.max_steps \(2 then, 3 now\)"):
        train(two_stages, "train.max_steps=3", resume=True)


def test_a_limit_that_makes_nothing_longer_changes_nothing(two_stages, tmp_path):
    train(two_stages, "stages.distil.train.max_student_tokens=100000")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    made = (tmp_path / "run" / "final" / "model.safetensors").stat().st_mtime_ns
    train(two_stages, "stages.distil.train.max_student_tokens=200000", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert (tmp_path / "run" / "final" / "model.safetensors").stat().st_mtime_ns == made


def test_what_fails_before_its_first_step_takes_nothing_back(two_stages, tmp_path):
    final, _ = train(two_stages)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(prompts.read_text() + "{half")
    with pytest.raises(ValueError, match="not JSON"):
        train(two_stages, "stages.distil.train.max_steps=9", resume=True)
    assert (final / "model.safetensors").exists()
