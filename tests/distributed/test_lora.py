"""Adapters on two ranks of ZeRO-3 against one process: the steps, and what rank 0 saves of sharded weights."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from minillm.config.loader.run_plan import load_run
from minillm.models.saving import save_model
from minillm.train.run import run
from tests.runs import Silent

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("deepspeed", "peft")),
    reason="deepspeed or peft is not installed",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, small_run, make_models, start, finish) -> tuple[Path, Path]:
    """The folders of one process and of two ranks, which checkpoint their activations as well."""
    folder = tmp_path_factory.mktemp("lora")
    models = make_models()
    save_model(models.teacher.model, models.tokenizer, folder / "teacher")
    document = small_run(folder, layers=2)
    document["student"]["lora"] = {"r": 2, "alpha": 8}
    document["teacher"] = {"path": str(folder / "teacher")}
    document["method"] = {"name": "minillm", "ppo_epochs": 2}
    document["rollout"]["buffer_size"] = 8
    document["train"] |= {"gradient_accumulation_steps": 2, "max_steps": 4}
    document["eval"] = {"sets": {}}
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    one, two = folder / "one", folder / "two"
    run(load_run([recipe], [f"output_dir={one}"]), resume=False, console=Silent())
    keys = ("engine.type=deepspeed", "train.gradient_accumulation_steps=1", "train.gradient_checkpointing=true")
    finish(start(2, "-m", "minillm", "train", str(recipe), f"output_dir={two}", *keys))
    return one, two


def steps(folder: Path) -> list[dict]:
    return [one for line in (folder / "metrics.jsonl").read_text().splitlines() if "loss" in (one := json.loads(line))]


def test_two_ranks_take_the_steps_of_one_process(runs):
    theirs, ours = map(steps, runs)
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (mine["step"], name)


@pytest.mark.parametrize("file", ["model.safetensors", "adapter/adapter_model.safetensors"])
def test_they_save_the_same_plain_model_and_adapter(runs, file):
    theirs, ours = (load_file(folder / "final" / file) for folder in runs)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_the_weights_below_are_those_of_one_process_to_the_bit(runs):
    theirs, ours = (load_file(folder / "bases" / "main" / "model.safetensors") for folder in runs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
