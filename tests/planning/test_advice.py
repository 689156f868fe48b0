"""What a plan that does not fit is told to change: keys that lower the peak, until it fits."""

import json

from minillm.config.loader.run_plan import load_run
from minillm.planning import planner as module
from minillm.planning.advice import advise
from minillm.planning.gpus import GPUS, USABLE_MEMORY, Gpu
from minillm.planning.planner import plan_run
from tests.planning.small import EVALUATION, SHARDED, planned


def test_advice_gathers_by_layers_where_whole_models_do_not_fit(recipe, monkeypatch):
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


def test_advice_lowers_the_peak_until_it_fits(recipe, monkeypatch):
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


def test_a_supervised_stage_is_planned_with_its_evaluation_and_advised_about_it(recipe, monkeypatch):
    path = recipe(method={"name": "sft"}, teacher=None, eval={**EVALUATION, "batch_size": 512})
    plan = load_run([path], [])
    (stage,) = plan_run(plan, gpu="A100-80GB").stages
    assert stage.peak.phase == "evaluation"
    update = next(phase.device_bytes for phase in stage.memory if phase.phase == "update")
    monkeypatch.setitem(GPUS, "small", Gpu("small", 2 * update / USABLE_MEMORY / 2**30))
    changes = advise(plan, plan_run(plan, gpu="small"), [])
    assert changes[0].overrides == ["eval.batch_size=256"] and changes[-1].fits


def test_where_one_gpu_does_not_hold_both_the_teacher_gets_one_of_its_own(recipe, monkeypatch):
    path = recipe(method={"name": "kd"})
    keys = ["train.gradient_checkpointing=true", "train.per_device_train_batch_size=1", "teacher.quantization=nf4"]
    peak = planned(path, *keys, gpu="A100-80GB").peak
    limit = peak.device_bytes - peak.device["teacher weights"] // 8
    monkeypatch.setitem(GPUS, "small", Gpu("small", limit / USABLE_MEMORY / 2**30))
    run = plan_run(load_run([path], keys), gpu="small")
    assert not run.fits
    (change,) = advise(load_run([path], keys), run, keys)
    assert change.overrides == ["teacher.device=cuda:1"] and change.fits


def test_where_the_hosts_memory_is_the_device_a_checkpoint_may_be_waited_for(recipe, monkeypatch):
    path, keys = recipe(), ["save.steps=5"]
    most = planned(path, *keys, "save.in_background=false").peak.device_bytes
    monkeypatch.setattr(module, "find_gpu", lambda name: Gpu("small", most / 0.92 / 2**30 + 1e-6, kind="cpu"))
    plan = load_run([path], keys)
    (change,) = advise(plan, plan_run(plan, gpu="small"), keys)
    assert change.overrides == ["save.in_background=false"] and change.fits
