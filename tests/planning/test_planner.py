"""Whole plans of small configurations: counts that can be computed by hand, and what the command prints."""

import json

import pytest
import torch

from minillm.cli.main import main
from minillm.config.loader.run_plan import load_run
from minillm.planning.planner import plan_run, planned_peak_gib
from tests.planning.small import SHARDED, planned


def test_every_rank_keeps_the_whole_buffer(recipe):
    one, two = (planned(recipe(), *SHARDED, gpu="A100-80GB", world_size=size) for size in (1, 2))
    assert one.work.buffered == two.work.buffered == 8
    assert tuple(plan.work.decodings[0].total for plan in (one, two)) == (8, 4)


@pytest.mark.parametrize(
    ("method", "phases"),
    [
        ({"name": "sft"}, ["update"]),
        ({"name": "kd"}, ["scoring", "update"]),
        ({"name": "gkd"}, ["rollout", "scoring", "update"]),
        ({"name": "seqkd"}, ["rollout", "update"]),
        ({"name": "minillm", "lm_coef": 0.0}, ["rollout", "scoring", "update"]),
    ],
)
def test_each_method_has_its_phases(recipe, method, phases):
    assert [phase.phase for phase in planned(recipe(method=method)).memory] == phases


def test_what_cannot_be_planned_is_said(recipe, capsys):
    path = recipe(student={"path": "someone/unheard-of"})
    assert main(["plan", str(path)]) == 2
    assert "someone--unheard-of.json" in capsys.readouterr().err
    assert main(["plan", str(recipe()), "--gpu", "abacus"]) == 2
    assert "H100-80GB" in capsys.readouterr().err
    assert main(["plan", str(recipe()), "--world-size", "2"]) == 2
    assert "one process" in capsys.readouterr().err


def test_the_peak_that_a_run_is_held_against_is_that_of_the_whole_plan(recipe):
    plan = load_run([recipe(engine={"type": "deepspeed", "stage": 3})], [])
    whole = plan_run(plan, gpu="A100-80GB", world_size=2)
    assert planned_peak_gib(plan, plan.stages[0], torch.device("cuda"), world_size=2) == whole.peak_bytes / 2**30
    for size in (3, 4):  # 8 answers are no whole number of their steps of 4
        assert planned_peak_gib(plan, plan.stages[0], torch.device("cuda"), world_size=size) is None


def of_elsewhere(recipe, *samplers):
    return recipe(method={"name": "elsewhere", "samplers": list(samplers)})


def test_a_method_of_elsewhere_is_planned_by_what_it_declares(recipe, methods_of_elsewhere, capsys):
    """Two samplers one after the other: the worse of their moments, and the sum of their times."""
    asked = (["student"], ["teacher"], ["student", "teacher"])
    student, teacher, both = (planned(of_elsewhere(recipe, *who), gpu="A100-80GB") for who in asked)
    rollouts = [{phase.phase: phase for phase in one.memory}["rollout"] for one in (student, teacher, both)]
    assert rollouts[2].device_bytes == max(one.device_bytes for one in rollouts)
    assert both.speed.seconds["rollout"] == student.speed.seconds["rollout"] + teacher.speed.seconds["rollout"]
    assert both.speed.rollout_flops == student.speed.rollout_flops + teacher.speed.rollout_flops
    timeline = both.simulation.phases["rollout"]
    assert timeline.most("student KV cache") > 0 < timeline.most("teacher KV cache")
    assert main(["plan", str(of_elsewhere(recipe, "teacher"))]) == 0
    assert "loss `imitation`" in capsys.readouterr().out


def test_a_stage_without_steps_trains_nothing(recipe, with_a_sieve, methods_of_elsewhere, capsys):
    path = with_a_sieve()
    choose, _ = plan_run(load_run([path]), gpu="A100-80GB").stages
    assert [phase.phase for phase in choose.memory] == ["scoring"] and choose.speed is None
    (scoring,) = choose.memory
    assert scoring.device["optimizer states"] == scoring.device["gradients"] == 0 < scoring.device["loss buffers"]
    assert choose.simulation.student.trained == 0
    assert main(["plan", str(path)]) == 0
    assert "time: not estimated, because the stage takes no step" in capsys.readouterr().out
    assert main(["plan", str(path), "--json"]) == 0
    stage = json.loads(capsys.readouterr().out)["stages"]["choose"]
    assert stage["flops_per_step"] is stage["estimated_seconds_per_step"] is stage["activations_bytes"] is None
