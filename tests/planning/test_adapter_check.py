"""Adapters in a plan: what is trained is counted, what is frozen is there once; and names are looked for beforehand."""

import importlib.util
import json

import pytest

from minillm.config.loader.run_plan import load_run
from minillm.planning.adapter_check import check_targets
from tests.planning.small import PARAMETERS, SHAPE, planned

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")

RANK = 4
# A is (r, in) and B (out, r): q and o 64 to 64, k and v 64 to 32, gate and up 64 to 128, down 128 to 64
ADAPTERS = 2 * RANK * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))


@pytest.fixture
def adapted(recipe):
    """Writes the small configuration, of fine-tuning, with some keys of the student; returns its path."""

    def write(student=None, **groups):
        keys = {"init": "random", "tokenizer": "byte", "config": SHAPE, **(student or {})}
        return recipe(student=keys, teacher=None, method={"name": "sft"}, **groups)

    return write


LORA = {"lora": {"r": RANK, "alpha": 8}}


def test_gradients_and_moments_are_those_of_the_adapters(adapted):
    whole, with_adapters = planned(adapted()), planned(adapted(LORA))
    stages = whole, with_adapters
    sizes = [stage.simulation.student for stage in stages]
    assert [(size.parameters, size.trained) for size in sizes] == [
        (PARAMETERS, PARAMETERS),
        (PARAMETERS + ADAPTERS, ADAPTERS),
    ]
    update = with_adapters.simulation.phases["update"]
    assert update.most("gradients") == 4 * ADAPTERS and update.most("optimizer states") == 8 * ADAPTERS
    weights = update.most("student weights") - whole.simulation.phases["update"].most("student weights")
    assert 0 <= weights - 4 * ADAPTERS < 1024
    # the frozen head has no gradient either
    losses = [stage.simulation.phases["update"].most("loss buffers") for stage in stages]
    assert losses[0] - losses[1] >= 4 * 512 * 64
    assert with_adapters.speed.update_flops < 0.8 * whole.speed.update_flops


def test_adapters_are_fp32_over_weights_of_any_dtype_but_under_deepspeed(adapted):
    update = planned(adapted({**LORA, "dtype": "bfloat16"})).simulation.phases["update"]
    assert update.most("gradients") == 4 * ADAPTERS and update.most("optimizer states") == 8 * ADAPTERS
    sharded = planned(adapted(LORA), "engine.type=deepspeed", "train.bf16=true", gpu="A100-80GB", world_size=2)
    update = sharded.simulation.phases["update"]
    assert update.most("gradients") == (2 + 4) * ADAPTERS and update.most("fp32 master weights") == 4 * ADAPTERS
    buckets = next(phase for phase in sharded.memory if phase.phase == "update").device["communication buckets"]
    assert buckets == 2 * 2 * ADAPTERS


def test_names_are_looked_for_before_the_first_stage(adapted):
    named = {"lora": {"r": 2, "alpha": 4, "target_modules": ["q_prj"]}}
    stages = {
        "first": {},
        "second": {"student": {**named, "path": "stage:first", "init": "pretrained", "config": None}},
    }
    plan = load_run([adapted(stages=stages)])
    with pytest.raises(ValueError, match=r"stage 'second': student.lora.target_modules: .* did you mean q_proj"):
        check_targets(plan)
    stages["second"]["student"]["lora"]["target_modules"] = ["q_proj"]
    check_targets(load_run([adapted(stages=stages)]))


def test_a_hub_name_that_is_not_here_is_left_to_its_stage(adapted):
    student = {
        "lora": {"r": 2, "alpha": 4, "target_modules": ["q_prj"]},
        "path": "nobody/nothing",
        "init": "pretrained",
    }
    check_targets(load_run([adapted({**student, "config": None})]))


def test_the_command_shows_both_counts(adapted, capsys):
    from minillm.cli.main import main

    path = str(adapted(LORA))
    assert main(["plan", path, "--gpu", "cpu"]) == 0
    assert f"{ADAPTERS:,} trained of {PARAMETERS + ADAPTERS:,}" in capsys.readouterr().out
    assert main(["plan", path, "--gpu", "cpu", "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"].values()
    assert stage["parameters"] == {"student": PARAMETERS + ADAPTERS, "student_trained": ADAPTERS, "teacher": None}
