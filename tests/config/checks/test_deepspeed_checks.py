"""The keys of engine.type deepspeed, and a DeepSpeed file that says something else than the YAML."""

import json

import pytest

from minillm.config.checks import deepspeed_checks
from minillm.config.deepspeed_file import read_deepspeed_file


@pytest.fixture
def problems(recipe, monkeypatch):
    """A function from the content of the DeepSpeed file and changes of `engine` to what is found."""
    monkeypatch.setattr(deepspeed_checks, "is_installed", lambda distribution: True)  # nothing here runs it

    def find(content=None, train=None, **engine):
        keys = {"type": "deepspeed", **engine}
        if content is not None:
            (recipe.folder / "ds.json").write_text(content if isinstance(content, str) else json.dumps(content))
            keys["config"] = "ds.json"
        return recipe.problems(engine=keys, train={"max_steps": 1, **(train or {})})

    return find


def test_what_the_file_does_not_say_or_leaves_to_us_is_fine(problems):
    assert problems({"wall_clock_breakdown": True, "zero_optimization": {"reduce_bucket_size": 1000}}) == {}
    auto = {"train_micro_batch_size_per_gpu": "auto", "bf16": {"enabled": "auto"}, "gradient_clipping": "auto"}
    assert problems(auto) == {}


def test_the_same_in_both_is_fine(problems):
    content = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}, "bf16": {"enabled": True}}
    assert problems(content, stage=2, offload_optimizer=True, train={"bf16": True}) == {}


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"zero_optimization": {"stage": 2}}, "engine.stage is 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "engine.offload_optimizer is false"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "engine.offload_param is false"),
        ({"train_micro_batch_size_per_gpu": 3}, "train.per_device_train_batch_size is 8"),
        ({"gradient_accumulation_steps": 7}, "train.gradient_accumulation_steps is 1"),
        ({"gradient_clipping": 0.5}, "train.max_grad_norm is 1.0"),
        ({"bf16": {"enabled": True}}, "train.bf16 is false"),
    ],
)
def test_what_contradicts_the_yaml_is_named(problems, content, key):
    assert key in problems(content, stage=3)["engine.config"]


@pytest.mark.parametrize("name", ["optimizer", "scheduler", "fp16"])
def test_what_has_no_effect_is_named(problems, name):
    assert f"its {name} has no effect" in problems({name: {}})["engine.config"]


def test_batches_and_places_that_minillm_decides_are_named(problems):
    assert "its train_batch_size has no effect" in problems({"train_batch_size": 64})["engine.config"]
    assert problems({"train_batch_size": "auto"}) == {}
    to_disk = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}
    assert "minillm offloads to the host" in problems(to_disk, offload_optimizer=True)["engine.config"]


def test_a_file_that_is_not_json(problems):
    assert "not JSON" in problems("{oops")["engine.config"]
    assert "not a JSON object" in problems("[1]")["engine.config"]


def test_the_file_is_found_as_every_path_is(problems, recipe, monkeypatch):
    monkeypatch.setenv("PLACE", str(recipe.folder))
    problems({"zero_optimization": {"stage": 2, "reduce_bucket_size": 50}})
    assert "engine.stage is 3" in problems(config="$PLACE/d?.json")["engine.config"]
    assert read_deepspeed_file("$PLACE/d?.json")["zero_optimization"]["reduce_bucket_size"] == 50
    assert read_deepspeed_file(None) == {}


def test_weights_stay_whole_below_stage_3(problems):
    assert "only stage 3" in problems(stage=2, offload_param=True)["engine.offload_param"]
    assert problems(stage=3, offload_param=True) == {}


def test_a_missing_package_is_said(recipe, monkeypatch):
    monkeypatch.setattr(deepspeed_checks, "is_installed", lambda distribution: distribution != "deepspeed")
    assert "pip install -e '.[deepspeed]'" in recipe.problems(engine={"type": "deepspeed"})["engine.type"]


def test_a_teacher_with_a_device_of_its_own_is_for_one_process(problems, recipe):
    recipe.document["teacher"]["device"] = "cuda:1"
    found = problems(stage=3)
    assert set(found) == {"teacher.device"}
    for said in ("engine.type torch", "stage 3 shards a teacher", "engine.offload_param", "teacher.type: served"):
        assert said in found["teacher.device"]
    recipe.document["teachers"] = {"a": recipe.document.pop("teacher"), "b": {"path": "models/big"}}
    recipe.document |= {"teachers_by": {"weights": {"a": 1, "b": 1}}, "method": {"name": "kd"}}
    assert set(problems(stage=2)) == {"teachers.a.device"}
