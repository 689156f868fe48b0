"""Adapters on two ranks of DeepSpeed against one process, and what the ranks save."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("deepspeed", "peft")),
    reason="deepspeed or peft is not installed",
)

TRAIN = ("-m", "minillm", "train")
HOW = {
    "stage-3": ("engine.gather=layers", "train.gradient_checkpointing=true"),
    "stage-2": ("engine.stage=2", "engine.offload_optimizer=true"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_run, start, finish) -> dict[str, Path]:
    """One process, and two ranks that hold everything but the adapters in pieces or none of it."""
    folder = tmp_path_factory.mktemp("lora")
    document = small_run(folder, layers=2)
    document["rollout"]["buffer_size"] = 8
    document["train"]["gradient_accumulation_steps"] = 2
    document["eval"] = {"sets": {}}
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}},
        "distil": {
            "student": {"lora": {"r": 2, "alpha": 8}},
            "teacher": {"path": "stage:teacher"},
            "method": {"name": "minillm", "ppo_epochs": 2},
            "train": {"max_steps": 4},
        },
    }
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    folders = {name: folder / name for name in ("one", *HOW)}
    finish(start(1, *TRAIN, str(recipe), f"output_dir={folders['one']}"))
    for name, keys in HOW.items():
        ranks = ("engine.type=deepspeed", "train.gradient_accumulation_steps=1", *keys)
        finish(start(2, *TRAIN, str(recipe), f"output_dir={folders[name]}", *ranks))
    return folders


def steps(folder: Path) -> list[dict]:
    return [one for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in (one := json.loads(line))]


@pytest.mark.parametrize("how", HOW)
def test_two_ranks_take_the_steps_of_one_process(runs, how):
    ours, theirs = steps(runs[how]), steps(runs["one"])
    assert len(ours) == len(theirs) == 6
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (mine["stage"], mine["step"], name)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("file", ["model.safetensors", "adapter/adapter_model.safetensors"])
def test_they_save_the_same_plain_model_and_adapter(runs, how, file):
    ours, theirs = (load_file(runs[name] / "final" / file) for name in (how, "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    bases = [load_file(runs[name] / "bases" / "distil" / "model.safetensors") for name in (how, "one")]
    assert all(torch.equal(bases[0][name], bases[1][name]) for name in bases[1])
