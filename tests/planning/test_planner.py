"""Whole plans of small configurations: counts that can be computed by hand, and what the command prints."""

import json

import pytest
import torch

from minillm.cli.main import main
from minillm.config.loader.run_plan import load_run
from minillm.planning import simulate
from minillm.planning.advice import advise
from minillm.planning.gpus import GPUS, USABLE_MEMORY, Gpu
from minillm.planning.planner import plan_run, planned_peak_gib
from minillm.rollout.local.static_loop import static_room
from tests.planning.small import ANSWER, PARAMETERS, PROMPT, planned


def test_weights_gradients_moments_and_caches_are_counted(recipe):
    stage = planned(recipe())
    assert stage.simulation.student.parameters == PARAMETERS
    assert stage.simulation.vocab_size == 512  # cut to what both heads have
    rollout = next(phase for phase in stage.memory if phase.phase == "rollout").device
    assert rollout["student weights"] >= 4 * PARAMETERS  # and the table of rotary frequencies
    assert rollout["student weights"] - 4 * PARAMETERS < 1024
    assert rollout["gradients"] == 0 and rollout["optimizer states"] == 8 * PARAMETERS
    assert stage.simulation.phases["update"].most("gradients") == 4 * PARAMETERS
    tokens = 4 * (PROMPT + ANSWER - 1)
    timeline = stage.simulation.phases["rollout"]
    assert (
        timeline.most("student KV cache") == tokens * 2 * 2 * 2 * 16 * 4
    )  # layers, keys and values, heads, size, fp32
    assert timeline.most("teacher KV cache") == tokens * 4 * 2 * 2 * 16 * 2  # bf16, one layer of it extrapolated
    assert stage.simulation.teacher.kv_bytes_per_token == 4 * 2 * 2 * 16 * 2


def test_with_cuda_graphs_the_caches_have_whole_buckets(recipe):
    key, path = "rollout.cuda_graphs=true", recipe()
    plain, graphs = (planned(path, *keys, gpu="A100-80GB") for keys in ((), (key,)))
    for who in ("student", "teacher"):
        part = f"{who} KV cache"
        few, many = (stage.simulation.phases["rollout"].most(part) for stage in (plain, graphs))
        assert many == few * static_room(PROMPT, ANSWER) // (PROMPT + ANSWER - 1) > few
    few, many = (stage.simulation.phases["rollout"].most("activations") for stage in (plain, graphs))
    assert many > few  # a step's memory stays beside that of the next prompts
    methods = ({"name": "gkd"}, {"name": "seqkd"})
    assert all(planned(recipe(method=method), key, gpu="A100-80GB").work.decodings[0].cuda_graphs for method in methods)


def test_the_buffer_is_counted_where_it_lies(recipe):
    path = recipe()
    bytes_of_buffer = 8 * ANSWER * (64 * 2 + 7 * 4)
    for gpu, place in (("cpu", "device"), ("A100-80GB", "host")):
        scoring = next(phase for phase in planned(path, gpu=gpu).memory if phase.phase == "scoring")
        assert getattr(scoring, place)["rollout buffer"] == 2 * bytes_of_buffer  # the old one beside the new one


SHARDED = ("engine.type=deepspeed", "train.bf16=true")


def test_deepspeed_brings_the_gradients_together_in_fp32_before_the_step(recipe):
    update = planned(recipe(), *SHARDED).simulation.phases["update"]
    assert update.most("gradients") == (2 + 4) * PARAMETERS and update.most("fp32 master weights") == 4 * PARAMETERS


def test_what_samples_and_scores_is_gathered_whole(recipe):
    """As the engine does it: minillm.rollout gathers once, so that no rank waits for another at every token."""
    stage = planned(recipe(), *SHARDED, gpu="A100-80GB", world_size=2)
    gathered = {phase.phase: phase.device["gathered weights"] for phase in stage.memory}
    student, teacher = stage.simulation.student, stage.simulation.teacher
    both = 2 * (student.parameters + teacher.parameters)
    assert gathered == {"rollout": both, "scoring": both, "update": 2 * student.parameters + 2 * 640 * 64}
    for phase in stage.memory:  # beside the rank's own half
        assert phase.device["gradients"] == student.parameters  # DeepSpeed keeps their place
        assert abs(phase.device["teacher weights"] - teacher.parameters) < 1024


def test_by_layers_only_the_heads_are_whole(recipe):
    stage = planned(recipe(), *SHARDED, "engine.gather=layers", gpu="A100-80GB", world_size=2)
    gathered = {phase.phase: phase.device["gathered weights"] for phase in stage.memory}
    models = stage.simulation.student, stage.simulation.teacher
    expected = sum(stage.sharding.layers(size) + 2 * size.head for size in models)
    assert gathered["rollout"] == gathered["scoring"] == expected


def test_advice_gathers_by_layers_where_whole_models_do_not_fit(recipe, monkeypatch):
    from minillm.planning import planner as module

    sizes = {"stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 1}
    zero = recipe().parent / "ds.json"  # models this small would live whole at once
    zero.write_text(json.dumps({"zero_optimization": sizes}))
    keys = [*SHARDED, f"engine.config={zero}", "train.per_device_train_batch_size=1", "rollout.batch_size=8"]
    stage = planned(recipe(), *keys, gpu="A100-80GB", world_size=2)
    peak = stage.peak
    assert peak.phase in ("rollout", "scoring")
    wanted = peak.device_bytes - peak.device["gathered weights"] // 4
    small = Gpu("small", wanted / 0.92 / 2**30, kind="cuda")
    monkeypatch.setattr(module, "find_gpu", lambda name: small)
    plan = load_run([recipe()], keys)
    changes = advise(plan, plan_run(plan, gpu="small", world_size=2), keys)
    assert changes[0].overrides == ["engine.gather=layers"]


def test_supervised_teachers_are_gathered_layer_by_layer(recipe):
    keys = ["student.config.num_hidden_layers=1"]
    stage = planned(recipe(method={"name": "kd"}), *SHARDED, *keys, gpu="A100-80GB", world_size=2)
    scoring = next(phase for phase in stage.memory if phase.phase == "scoring")
    assert scoring.device["gathered weights"] == stage.sharding.layers(stage.simulation.teacher)


def test_every_rank_keeps_the_whole_buffer(recipe):
    one, two = (planned(recipe(), *SHARDED, gpu="A100-80GB", world_size=size) for size in (1, 2))
    assert one.work.buffered == two.work.buffered == 8
    assert tuple(plan.work.decodings[0].total for plan in (one, two)) == (8, 4)


def test_what_is_planned_twice_is_simulated_once(recipe, monkeypatch):
    """A stage is planned for its ranks and for one; two stages of the same shapes are one."""
    runs, run = [], simulate._Simulator.run
    monkeypatch.setattr(simulate, "_DONE", {})
    monkeypatch.setattr(simulate._Simulator, "run", lambda self, wanted: runs.append(wanted) or run(self, wanted))
    plan_run(load_run([recipe(stages={"one": {}, "two": {"train": {"learning_rate": 1e-3}}})]), gpu="cpu")
    assert len(runs) == 1


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


def test_checkpointing_and_smaller_parts_need_less(recipe):
    path = recipe(method={"name": "kd"})
    keys = ["student.config.num_hidden_layers=6", "train.per_device_train_batch_size=16"]
    whole = planned(path, *keys)
    assert whole.activations(True) < whole.activations(False)
    checkpointed = planned(path, *keys, "train.gradient_checkpointing=true")
    assert checkpointed.peak.device_bytes < whole.peak.device_bytes
    parts = planned(path, *keys, "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=4")
    assert parts.peak.device_bytes < whole.peak.device_bytes


def test_advice_lowers_the_peak_until_it_fits(recipe, monkeypatch):
    from minillm.planning import planner as module

    # a device that holds what is asked for only with less alive at a time
    path = recipe(method={"name": "sft"}, teacher=None)
    keys = ["student.config.num_hidden_layers=6", "train.per_device_train_batch_size=64"]
    peak = planned(path, *keys).peak.device_bytes
    small = Gpu("small", peak * 0.75 / 0.92 / 2**30, kind="cpu")
    monkeypatch.setattr(module, "find_gpu", lambda name: small)
    plan = load_run([path], keys)
    run = plan_run(plan, gpu="small")
    assert not run.fits
    changes = advise(plan, run, keys)
    assert changes[0].overrides == ["train.gradient_checkpointing=true"]
    assert changes[-1].fits and changes[-1].peak_bytes <= small.usable_bytes
    assert all(one.peak_bytes < peak for one in changes)


def test_the_command_and_its_json(recipe, capsys):
    path = str(recipe())
    assert main(["plan", path, "--gpu", "4090"]) == 0
    shown = capsys.readouterr().out
    for text in (f"{PARAMETERS:,}", "student KV cache", "full logits would take", "fits: peak", "(an estimate)"):
        assert text in shown
    assert main(["plan", path, "--gpu", "cpu", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    stage = data["stages"]["main"]
    assert stage["parameters"]["student"] == PARAMETERS and data["fits"] is True and data["advice"] == []
    assert stage["estimated_seconds_per_step"] is None  # nothing is known of this machine's speed
    assert sum(stage["memory_bytes"][stage["peak_phase"]]["device"].values()) == data["peak_bytes"]


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


EVALUATION = {"sets": {"a": {"type": "pydoc", "max_prompt_length": 30, "max_response_length": 9}},
              "batch_size": 6, "max_new_tokens": 50}  # fmt: skip


def test_an_evaluation_has_caches_and_gathers_of_its_own(recipe):
    stage = planned(recipe(eval=EVALUATION))
    assert [phase.phase for phase in stage.memory] == ["rollout", "scoring", "update", "evaluation"]
    timeline = stage.simulation.phases["evaluation"]
    tokens = 6 * (30 + 50 - 1)
    assert timeline.most("student KV cache") == tokens * 2 * 2 * 2 * 16 * 4
    assert timeline.most("teacher KV cache") == tokens * 4 * 2 * 2 * 16 * 2
    assert stage.simulation.losses["evaluation"].rows == 6 * 50
    alone = planned(recipe(eval={**EVALUATION, "teacher": False})).simulation.phases["evaluation"]
    assert alone.most("teacher KV cache") == 0 < alone.most("student KV cache")
    sharded = planned(recipe(eval=EVALUATION), *SHARDED, gpu="A100-80GB", world_size=2)
    gathered = {phase.phase: phase.device["gathered weights"] for phase in sharded.memory}
    assert gathered["evaluation"] == gathered["scoring"] > gathered["update"]


def test_a_supervised_stage_is_planned_with_its_evaluation_and_advised_about_it(recipe, monkeypatch):
    path = recipe(method={"name": "sft"}, teacher=None, eval={**EVALUATION, "batch_size": 512})
    plan = load_run([path], [])
    (stage,) = plan_run(plan, gpu="A100-80GB").stages
    assert stage.peak.phase == "evaluation"
    update = next(phase.device_bytes for phase in stage.memory if phase.phase == "update")
    monkeypatch.setitem(GPUS, "small", Gpu("small", 2 * update / USABLE_MEMORY / 2**30))
    changes = advise(plan, plan_run(plan, gpu="small"), [])
    assert changes[0].overrides == ["eval.batch_size=256"] and changes[-1].fits


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


def test_what_a_method_trains_beside_the_student_is_named(recipe, methods_of_elsewhere, capsys):
    path = recipe(method={"name": "elsewhere", "samplers": ["student"], "trains": ["student", "projector"]})
    assert main(["plan", str(path)]) == 0
    assert "not counted: what the method trains beside the student: projector" in capsys.readouterr().out
    assert main(["plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]["main"]["not_counted"]


def with_a_sieve(recipe, tmp_path, **keys):
    (tmp_path / "corpus.txt").write_text("plain text")
    corpus = {"path": str(tmp_path / "corpus.txt"), "block_size": 32}
    prompts = {"type": "pydoc", "max_prompt_length": PROMPT, "max_response_length": ANSWER}
    stages = {"choose": {"method": {"name": "sieve", **keys}}, "train": {"method": {"name": "sft"}}}
    return recipe(data={"prompts": prompts, "corpus": corpus}, stages=stages)


def test_a_stage_without_steps_trains_nothing(recipe, tmp_path, methods_of_elsewhere, capsys):
    path = with_a_sieve(recipe, tmp_path)
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


def test_a_stage_with_nothing_to_plan_is_said_in_one_line(recipe, tmp_path, methods_of_elsewhere, capsys):
    path = with_a_sieve(recipe, tmp_path, corpus=False)
    assert main(["plan", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "stage choose is not in the plan: method sieve takes no step and declares neither answers nor texts" in shown
    assert main(["plan", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data["unplanned"]) == ["choose"] and list(data["stages"]) == ["train"]
    alone = recipe(method={"name": "sieve", "corpus": False})
    assert main(["plan", str(alone)]) == 2
    assert "stage 'main': method sieve takes no step" in capsys.readouterr().err
