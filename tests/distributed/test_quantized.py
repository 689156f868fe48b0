"""A teacher in 4 bits, replicated on each rank beside a sharded student: the steps are those of one process."""

import importlib.util
import json

import pytest
import torch
import yaml

from minillm.config.models import StudentConfig
from minillm.models.loading import load_student
from minillm.models.saving import save_model
from minillm.models.tokenizers import load_tokenizer

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("deepspeed", "bitsandbytes")),
    reason="deepspeed or bitsandbytes is not installed",
)


def test_two_ranks_take_the_steps_of_one_process(tmp_path, small_run, start, finish):
    document = small_run(tmp_path, layers=2)
    keys = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = StudentConfig(init="random", tokenizer="byte", config={**document["student"]["config"], **keys})
    model = load_student(config, output_dir=tmp_path, device=torch.device("cpu"), seed=5)
    save_model(model, load_tokenizer(config, tmp_path), tmp_path / "teacher")
    document["teacher"] = {"path": str(tmp_path / "teacher"), "quantization": "nf4"}
    document["method"] = {"name": "minillm", "ppo_epochs": 2}
    document["rollout"]["buffer_size"] = 8
    document["train"] |= {"gradient_accumulation_steps": 2, "max_steps": 4}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(document, sort_keys=False))
    one, two = tmp_path / "one", tmp_path / "two"
    command = ("-m", "minillm", "train", str(recipe))
    finish(start(1, *command, f"output_dir={one}"))
    finish(start(2, *command, f"output_dir={two}", "engine.type=deepspeed", "train.gradient_accumulation_steps=1"))
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (two, one)
    )
    assert len(ours) == len(theirs) and any(record["kind"] == "eval" for record in ours)
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "mean"):
            if name in other:
                assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5), (mine["stage_step"], name)
