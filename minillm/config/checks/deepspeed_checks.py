"""The keys of engine.type deepspeed, and a DeepSpeed file that must not contradict them."""

import json
from collections.abc import Iterator
from typing import Any

from minillm import UserError
from minillm.config.checks.facts import Facts, Found, Idle
from minillm.config.checks.packages import is_installed
from minillm.config.deepspeed_file import read_deepspeed_file
from minillm.config.models import TeacherConfig, teachers_of
from minillm.config.training import DeepSpeedEngine, Engine, TrainConfig

NOWHERE = (None, "none")  # devices of DeepSpeed that mean no offload


def deepspeed_installed(facts: Facts, engine: Engine) -> Iterator[Found]:
    """DeepSpeed itself is installed."""
    if engine.type == "deepspeed" and not is_installed("deepspeed"):
        message = "deepspeed needs the package of that name: pip install -e '.[deepspeed]' in minillm's folder"
        yield Found("engine.type", message)


def sharding_keys(facts: Facts, engine: Engine) -> Iterator[Found]:
    """Keys for sharded weights are used with stage 3, and those for a sharded teacher with one that is sharded."""
    teachers = teachers_of(facts.groups.get("teacher"))
    if engine.type != "deepspeed":
        return
    for key, one in teachers.items():
        if isinstance(one, TeacherConfig) and one.device is not None:
            message = (
                "is for engine.type torch: each rank of deepspeed has one GPU, with its part of the student and of the "
                "teacher on it; stage 3 shards a teacher, with engine.offload_param its shards lie in the host's memory, and "
                "`minillm serve` has one on other GPUs (teacher.type: served)"
            )
            yield Found(f"{key}.device", message, ("engine.type",))
    if engine.stage != 3:
        if engine.offload_param:
            message = (
                f"stage {engine.stage} leaves all weights on every rank; only stage 3 can keep their shards in the host"
            )
            yield Found("engine.offload_param", message, ("engine.stage",))
        if engine.gather == "layers":
            message = f"stage {engine.stage} leaves all weights on every rank, so that nothing is gathered"
            yield Found("engine.gather", message, ("engine.stage",))
        if engine.replicate_teacher:
            message = f"stage {engine.stage} replicates the teacher as it is"
            yield Found("engine.replicate_teacher", message, ("engine.stage",))
        return
    local = {key: one for key, one in teachers.items() if isinstance(one, TeacherConfig)}
    quantized = [key for key, one in local.items() if one.quantization is not None]
    if not teachers:
        yield Idle("engine.replicate_teacher", "has no effect: there is no teacher", ("teacher",))
    elif engine.replicate_teacher and not local:
        key, one = next(iter(teachers.items()))
        message = f"has no effect: of a {one.type} teacher every rank has the head alone"
        yield Found("engine.replicate_teacher", message, (f"{key}.type",))
    elif engine.replicate_teacher and len(quantized) == len(local):
        message = "has no effect: a quantised teacher is replicated on every rank anyway"
        yield Found("engine.replicate_teacher", message, (f"{quantized[0]}.quantization",))
    elif quantized and not engine.replicate_teacher and len(quantized) < len(local):
        message = (
            "a quantised teacher is replicated on every rank, and the others would be sharded: quantise all of them or none, "
            "or set engine.replicate_teacher"
        )
        yield Found(f"{quantized[0]}.quantization", message, ("engine.replicate_teacher",))


def deepspeed_file(facts: Facts, engine: Engine) -> Iterator[Found]:
    """The DeepSpeed file does not contradict the YAML, and leaves out what `train` decides."""
    if engine.type != "deepspeed":
        return
    try:
        given = read_deepspeed_file(facts.data["engine"].get("config"))
    except UserError as problem:
        yield Found("engine.config", str(problem))
        return
    for key, (name, theirs, ours) in _said_twice(given, engine, facts.groups.get("train")).items():
        if theirs not in (None, "auto", ours):
            yield Found(
                "engine.config",
                f"its {name} is {json.dumps(theirs)}, but {key} is {json.dumps(ours)}; leave it out there or say auto",
                (key,),
            )
    for name in ("optimizer", "scheduler", "fp16", "train_batch_size"):
        if given.get(name, "auto") != "auto":
            yield Found("engine.config", f"its {name} has no effect here: `train` says that; leave it out there")
    zero = given.get("zero_optimization", {})
    for part in ("offload_optimizer", "offload_param"):
        device = zero.get(part, {}).get("device")
        if getattr(engine, part) and device not in (*NOWHERE, "cpu"):
            message = f"its zero_optimization.{part}.device is {json.dumps(device)}; minillm offloads to the host"
            yield Found("engine.config", message)


def _said_twice(
    given: dict[str, Any], engine: DeepSpeedEngine, train: TrainConfig | None
) -> dict[str, tuple[str, Any, Any]]:
    """{our key: (DeepSpeed's key, its value or None, our value)} for all settings that both files can have."""
    zero = given.get("zero_optimization", {})

    def offload(part: str) -> tuple[str, bool | None, bool]:
        theirs = zero[part].get("device") not in NOWHERE if part in zero else None
        return f"zero_optimization.{part}.device", theirs, getattr(engine, part)

    says = {
        "engine.stage": ("zero_optimization.stage", zero.get("stage"), engine.stage),
        "engine.offload_optimizer": offload("offload_optimizer"),
        "engine.offload_param": offload("offload_param"),
    }
    if train is None:  # it is in error itself
        return says
    return says | {
        "train.per_device_train_batch_size": (
            "train_micro_batch_size_per_gpu",
            given.get("train_micro_batch_size_per_gpu"),
            train.per_device_train_batch_size,
        ),
        "train.gradient_accumulation_steps": (
            "gradient_accumulation_steps",
            given.get("gradient_accumulation_steps"),
            train.gradient_accumulation_steps,
        ),
        "train.max_grad_norm": ("gradient_clipping", given.get("gradient_clipping"), train.max_grad_norm or 0.0),
        "train.bf16": ("bf16.enabled", given.get("bf16", {}).get("enabled"), train.bf16),
    }
