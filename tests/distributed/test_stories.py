"""A real teacher and its pruned student, both sharded over two ranks: twelve MiniLLM steps are those of one process.

Three buffers, the later two sampled by students that have trained. Their losses agree to 1e-6; many buffers later a
token that is drawn at a near tie falls the other way, and the two are runs of their own from there on.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

STEPS = 12


@pytest.fixture
def recipe(tmp_path, assets) -> Path:
    model = str(assets / "models" / "stories260k")
    prompts = {"type": "text", "path": str(assets / "data" / "tinystories" / "stories.jsonl"), "limit": 64,
               "prompt_length": 16, "max_prompt_length": 16, "max_response_length": 24}  # fmt: skip
    document = {
        "seed": 1,
        "teacher": {"path": model},
        "student": {"path": model, "init": "prune", "layers": [0, 2, 4]},
        "data": {"prompts": prompts},
        "rollout": {"buffer_size": 16, "batch_size": 8, "max_new_tokens": 24},
        "method": {"name": "minillm", "lm_coef": 0.0, "ppo_epochs": 2},
        "train": {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 3e-4, "warmup_steps": 5},
        "log": {"report_to": []},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def losses(folder: Path) -> list[float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


def test_two_ranks_take_the_steps_of_one_process(recipe, tmp_path, start, finish):
    one, two = tmp_path / "one", tmp_path / "two"
    command = ("-m", "minillm", "train", str(recipe))
    finish(start(1, *command, f"output_dir={one}", "train.gradient_accumulation_steps=2"))
    finish(start(2, *command, f"output_dir={two}", "engine.type=deepspeed"))
    ours, theirs = losses(two), losses(one)
    assert len(ours) == len(theirs) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
