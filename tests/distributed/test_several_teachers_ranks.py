"""Several teachers sharded over two ranks of ZeRO-3 take the steps of one process: every rank takes part in the passes of each
teacher, and gathers its head, also where none of its records is that teacher's."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from tests.runs import every_record

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

IN_TURN = ("kd", "mixed", "minillm")
HOW = {
    "stage-3-by-layers": ("engine.gather=layers",),  # where ranks that run other passes wait for each other forever
    "stage-3": (),
    # one in memory at a time, whole on each rank; the ranks open different ones where their records are
    "stage-2-in-turn": ("engine.stage=2", *(f"stages.{name}.teachers_by.in_memory=one" for name in IN_TURN)),
}
BY_FIELD, MIXED = {"field": "domain"}, {"weights": {"math": 3, "chat": 1}}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("several")
    document = small_run(folder, layers=1)
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    # of micro-batches of two, most are of one teacher's records alone
    named = [{**line, "domain": "chat" if place < 2 else "math"} for place, line in enumerate(lines)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in named))
    document["rollout"]["buffer_size"] = 8
    document["train"] |= {"gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    document["eval"]["sets"]["held_out"]["limit"] = 3  # not a multiple of the ranks, and two are chat's
    teachers = {name: {"path": f"stage:{name}"} for name in ("math", "chat")}
    document["stages"] = {
        "math": {"student": {"config": {"hidden_size": 24}}, "eval": None},
        "chat": {"student": {"config": {"hidden_size": 32}}, "eval": None},
        "kd": {"teachers": teachers, "teachers_by": BY_FIELD, "method": {"name": "kd"}},
        "mixed": {"teachers": teachers, "teachers_by": MIXED, "method": {"name": "kd"}, "eval": None},
        "minillm": {
            "teachers": teachers,
            "teachers_by": BY_FIELD,
            "method": {"name": "minillm", "alpha": 0.0, "lm_coef": 0.0, "ppo_epochs": 2},
            "train": {"max_steps": 4},
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.mark.parametrize("how", HOW)
def test_two_ranks_take_the_steps_of_one_process(unbroken, how):
    ours, theirs = (every_record(unbroken[name]) for name in (how, "one"))
    assert len(ours) == len(theirs) and {one["stage"] for one in ours} == {"math", "chat", "kd", "mixed", "minillm"}
    for mine, other in zip(ours, theirs, strict=True):
        where = mine["stage"], mine["kind"], mine["stage_step"]
        if mine["kind"] == "eval":
            assert mine["mean"] == pytest.approx(other["mean"], rel=1e-4, abs=1e-5), where
            assert "reverse_kl_nats" in mine["mean"]
            continue
        for name in ("loss", "grad_norm", "student_tokens"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (where, name)
