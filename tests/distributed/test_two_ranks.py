"""Two ranks of DeepSpeed against one process: the same recipe, the same steps, for every method and stage of ZeRO."""

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

TWO = ("engine.type=deepspeed", "train.gradient_accumulation_steps=1")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("two")
    document = small_run(folder, layers=2)
    document["rollout"]["buffer_size"] = 8
    document["train"] |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    document["eval"]["sets"]["held_out"]["limit"] = 3  # not a multiple of the ranks
    taught = {"teacher": {"path": "stage:teacher"}}
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}},
        "kd": {**taught, "method": {"name": "kd"}},
        "gkd": {**taught, "method": {"name": "gkd"}},
        "seqkd": {**taught, "method": {"name": "seqkd"}},
        "distil": {**taught, "method": {"name": "minillm", "ppo_epochs": 2}, "train": {"max_steps": 4}},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


TRAIN = ("-m", "minillm", "train")


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(recipe, start, finish) -> dict[str, Path]:
    folders = {name: recipe.parent / name for name in ("one", "two", "layers")}
    finish(start(1, *TRAIN, str(recipe), f"output_dir={folders['one']}"))
    finish(start(2, *TRAIN, str(recipe), f"output_dir={folders['two']}", *TWO))
    finish(start(2, *TRAIN, str(recipe), f"output_dir={folders['layers']}", *TWO, "engine.gather=layers"))
    return folders


@pytest.mark.parametrize("how", ["two", "layers"])
def test_two_ranks_take_the_steps_of_one_process(unbroken, how):
    ours, theirs = records(unbroken[how]), records(unbroken["one"])
    assert len(ours) == len(theirs) and {record["stage"] for record in ours} >= {"teacher", "kd", "gkd", "distil"}
    for mine, other in zip(ours, theirs, strict=True):
        where = mine["stage"], mine["kind"], mine["stage_step"]
        assert (mine["kind"], mine["stage"], mine["student_tokens"]) == (
            other["kind"], other["stage"], other["student_tokens"])  # fmt: skip
        if mine["kind"] == "eval":
            assert mine["mean"] == pytest.approx(other["mean"], rel=1e-4, abs=1e-5), where
            continue
        for name in ("loss", "grad_norm", "learning_rate"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (where, name)


@pytest.mark.parametrize("how", ["two", "layers"])
def test_the_final_models_are_whole_and_alike(unbroken, how):
    ours, theirs = (load_file(unbroken[name] / "final" / "model.safetensors") for name in (how, "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_a_killed_rank_is_named_and_the_run_goes_on(unbroken, recipe, start, finish):
    folder = recipe.parent / "killed"
    arguments = (str(recipe), f"output_dir={folder}", *TWO)
    first, second = start(2, *TRAIN, *arguments)
    deadline = time.monotonic() + 120
    while not (saved := list(folder.glob("checkpoint-*/manifest.json"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert saved, "no checkpoint within two minutes"
    second.kill()
    output, _ = first.communicate(timeout=60)
    second.communicate()
    assert first.returncode == 1 and f"rank 1 (process {second.pid} on" in output, output[-3000:]
    assert f"process {second.pid}" in (folder / "ranks" / "rank-0.log").read_text()
    finish(start(2, *TRAIN, *arguments, "--resume"))
    ours, theirs = (load_file(path / "final" / "model.safetensors") for path in (folder, unbroken["two"]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
