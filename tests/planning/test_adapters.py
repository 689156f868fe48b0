"""Adapters in a plan: what is trained is counted, what is frozen is there once; and names are looked for beforehand."""

import importlib.util
import json

import pytest
import yaml

from minillm.config.loading import load_run
from minillm.planning.adapters import check_targets
from minillm.planning.plan import plan_run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")

SHAPE = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": False}  # fmt: skip
LAYER = 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
BASE = 2 * LAYER + 2 * 512 * 64 + 64
RANK = 4
# A is (r, in) and B (out, r): q and o 64 to 64, k and v 64 to 32, gate and up 64 to 128, down 128 to 64
ADAPTERS = 2 * RANK * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


@pytest.fixture
def recipe(tmp_path):
    """Writes a configuration with the student's keys and other groups, and returns its path."""

    def write(student=None, **groups):
        keys = {
            "output_dir": str(tmp_path / "run"),
            "student": {"init": "random", "tokenizer": "byte", "config": SHAPE, **(student or {})},
            "data": {"prompts": {"type": "pydoc", "max_prompt_length": 10, "max_response_length": 6}},
            "method": {"name": "sft"},
            "train": {"max_steps": 2, "per_device_train_batch_size": 4},
            **groups,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(keys))
        return path

    return write


def planned(path, *overrides, **options):
    return plan_run(load_run([path], overrides), **{"gpu": "cpu", **options}).stages[0]


LORA = {"lora": {"r": RANK, "alpha": 8}}


def test_gradients_and_moments_are_those_of_the_adapters(recipe):
    whole, adapted = planned(recipe()), planned(recipe(LORA))
    sizes = [stage.simulation.student for stage in (whole, adapted)]
    assert [(size.parameters, size.trained) for size in sizes] == [(BASE, BASE), (BASE + ADAPTERS, ADAPTERS)]
    update = adapted.simulation.phases["update"]
    assert update.most("gradients") == 4 * ADAPTERS and update.most("optimizer states") == 8 * ADAPTERS
    weights = update.most("student weights") - whole.simulation.phases["update"].most("student weights")
    assert 0 <= weights - 4 * ADAPTERS < 1024
    # the frozen head has no gradient either
    losses = [stage.simulation.phases["update"].most("loss buffers") for stage in (whole, adapted)]
    assert losses[0] - losses[1] >= 4 * 512 * 64
    assert adapted.speed.update_flops < 0.8 * whole.speed.update_flops


def test_adapters_are_fp32_over_weights_of_any_dtype_but_under_deepspeed(recipe):
    update = planned(recipe({**LORA, "dtype": "bfloat16"})).simulation.phases["update"]
    assert update.most("gradients") == 4 * ADAPTERS and update.most("optimizer states") == 8 * ADAPTERS
    sharded = planned(recipe(LORA), "engine.type=deepspeed", "train.bf16=true", gpu="A100-80GB", world_size=2)
    update = sharded.simulation.phases["update"]
    assert update.most("gradients") == (2 + 4) * ADAPTERS and update.most("fp32 master weights") == 4 * ADAPTERS
    buckets = next(phase for phase in sharded.memory if phase.phase == "update").device["communication buckets"]
    assert buckets == 2 * 2 * ADAPTERS


def test_names_are_looked_for_before_the_first_stage(recipe):
    named = {"lora": {"r": 2, "alpha": 4, "target_modules": ["q_prj"]}}
    stages = {
        "first": {},
        "second": {"student": {**named, "path": "stage:first", "init": "pretrained", "config": None}},
    }
    plan = load_run([recipe(stages=stages)])
    with pytest.raises(ValueError, match=r"stage 'second': student.lora.target_modules: .* did you mean q_proj"):
        check_targets(plan)
    stages["second"]["student"]["lora"]["target_modules"] = ["q_proj"]
    check_targets(load_run([recipe(stages=stages)]))


def test_a_hub_name_that_is_not_here_is_left_to_its_stage(recipe):
    student = {
        "lora": {"r": 2, "alpha": 4, "target_modules": ["q_prj"]},
        "path": "nobody/nothing",
        "init": "pretrained",
    }
    check_targets(load_run([recipe({**student, "config": None})]))


def test_the_command_shows_both_counts(recipe, capsys):
    from minillm.cli import main

    path = str(recipe(LORA))
    assert main(["plan", path, "--gpu", "cpu"]) == 0
    assert f"{ADAPTERS:,} trained of {BASE + ADAPTERS:,}" in capsys.readouterr().out
    assert main(["plan", path, "--gpu", "cpu", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"].values()
    assert stage["parameters"] == {"student": BASE + ADAPTERS, "student_trained": ADAPTERS, "teacher": None}
