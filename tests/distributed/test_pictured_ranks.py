"""Models of images and text on two ranks take the steps of one process: every rank reads the pictures that it needs."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.pictures import picture, save_seeing
from tests.runs import TRAIN, TWO_RANKS, every_record

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

FEW = ("stages.seqkd=null",)  # all stages once, and in the other ways without this one
HOW = {"stage-3": (), "stage-3-by-layers": ("engine.gather=layers", *FEW), "stage-2": ("engine.stage=2", *FEW)}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for name, images in (("shown", True), ("told", False)):
        lines = []
        for number, answer in enumerate(("red", "a blue one", "two", "dots", "green", "it is a cat", "no")):
            picture(number).save(folder / f"{number}.png")
            record = {"prompt": f"what is {answer}?", "completion": answer}
            lines.append(json.dumps(record | ({"image": f"{number}.png"} if images else {})))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    prompts = {"type": "jsonl", "path": str(folder / "shown.jsonl"), "template": "chat",
               "max_prompt_length": 128, "max_response_length": 8}  # fmt: skip
    document = {
        "output_dir": str(folder / "run"),
        "seed": 5,
        "student": {"path": str(save_seeing("qwen2_vl", folder / "student"))},
        "teacher": {"path": str(save_seeing("qwen2_vl", folder / "teacher", width=48, seed=1))},
        "data": {"prompts": prompts},
        "rollout": {"buffer_size": 8, "batch_size": 4, "max_new_tokens": 5},
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
        },
        "eval": {"steps": 2, "sets": {"held_out": {**prompts, "limit": 3}}, "max_new_tokens": 5},
        "save": {"steps": 1, "keep": 2},
        "log": {"report_to": []},
        "stages": {
            "kd": {"method": {"name": "kd"}},
            "seqkd": {"method": {"name": "seqkd"}},
            "distil": {"method": {"name": "minillm", "ppo_epochs": 2, "lm_coef": 0.0}, "train": {"max_steps": 4}},
            # the vision towers run nowhere
            "told": {"method": {"name": "kd"}, "data": {"prompts": {"path": str(folder / "told.jsonl")}}},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.mark.parametrize("how", HOW)
def test_two_ranks_take_the_steps_of_one_process(unbroken, how):
    trained = {name for name in ("kd", "seqkd", "distil", "told") if f"stages.{name}=null" not in HOW[how]}
    ours = every_record(unbroken[how])
    theirs = [record for record in every_record(unbroken["one"]) if record["stage"] in trained]
    assert len(ours) == len(theirs) and {record["stage"] for record in ours} == trained
    for mine, other in zip(ours, theirs, strict=True):
        where = mine["stage"], mine["kind"], mine["stage_step"]
        assert mine["student_tokens"] == other["student_tokens"], where
        if mine["kind"] == "eval":
            assert mine["mean"] == pytest.approx(other["mean"], rel=1e-4, abs=1e-5), where
            continue
        for name in ("loss", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (where, name)
    for stage in ("distil", "told"):
        states = [load_file(unbroken[name] / "stages" / stage / "model.safetensors") for name in (how, "one")]
        for name, tensor in states[1].items():
            torch.testing.assert_close(states[0][name], tensor, rtol=1e-3, atol=1e-5, msg=f"{stage}: {name}")


def test_pictures_for_some_ranks_alone_are_refused(recipe, start):
    """A rank whose prompts show none would not run the vision tower that the other waits for."""
    document = yaml.safe_load(recipe.read_text())
    mixed = recipe.with_name("mixed.jsonl")
    mixed.write_text(recipe.with_name("shown.jsonl").read_text() + recipe.with_name("told.jsonl").read_text())
    document["stages"] = {"kd": {"method": {"name": "kd"}, "data": {"prompts": {"path": str(mixed)}}}}
    path = recipe.with_name("mixed.yaml")
    path.write_text(yaml.safe_dump(document))
    ranks = start(2, *TRAIN, str(path), f"output_dir={recipe.parent / 'mixed'}", *TWO_RANKS)
    outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert "7 of 14 prompts show pictures; on several ranks all must, or none" in " ".join(outputs[0].split())
