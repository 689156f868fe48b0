"""Teachers that are in memory one at a time, whole on each of two ranks, which take the steps of one process with all of them."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from tests.runs import every_record

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

HOW = {"stage-2": ("engine.stage=2", *(f"stages.{name}.teachers_by.in_memory=one" for name in ("kd", "minillm")))}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("turns")
    document = small_run(folder, layers=1)
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    # of micro-batches of two, most are of one teacher's records alone: the ranks open different ones
    named = [{**line, "domain": "chat" if place < 2 else "math"} for place, line in enumerate(lines)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    document["rollout"]["buffer_size"] = 8
    document["train"] |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    document["eval"]["sets"]["held_out"]["limit"] = 3
    teachers = {name: {"path": f"stage:{name}"} for name in ("math", "chat")}
    keys = {"teachers": teachers, "teachers_by": {"field": "domain"}}
    minillm = {"name": "minillm", "alpha": 0.0, "lm_coef": 0.0, "ppo_epochs": 2}
    document["stages"] = {
        "math": {"student": {"config": {"hidden_size": 24}}, "eval": None},
        "chat": {"student": {"config": {"hidden_size": 32}}, "eval": None},
        "kd": {**keys, "method": {"name": "kd"}},
        "minillm": {**keys, "method": minillm, "eval": None},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.mark.parametrize("how", HOW)
def test_two_ranks_take_the_steps_of_one_process(unbroken, how):
    ours, theirs = (every_record(unbroken[name]) for name in (how, "one"))
    assert len(ours) == len(theirs) and {one["stage"] for one in ours} == {"math", "chat", "kd", "minillm"}
    for mine, other in zip(ours, theirs, strict=True):
        where = mine["stage"], mine["kind"], mine["stage_step"]
        if mine["kind"] == "eval":
            assert mine["mean"] == pytest.approx(other["mean"], rel=1e-4, abs=1e-5), where
            continue
        for name in ("loss", "grad_norm", "student_tokens"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (where, name)
