"""What a student or teacher needs beyond its path: the keys of its `init`, layers that exist, installed packages."""

import json
from collections import Counter
from collections.abc import Iterator
from importlib import metadata

from minillm.config.checks.facts import Facts, Found, architecture_of
from minillm.config.deepspeed_file import read_deepspeed_file
from minillm.config.lora import HEAD_REFUSED, HEADS, TABLE_REFUSED, TABLES
from minillm.config.models import OF_INIT, StudentConfig, TeacherConfig
from minillm.config.training import Engine

# attn_implementation -> (distribution, how to get it)
_FLASH = {
    "flash_attention_2": (
        "flash-attn",
        "pip install flash-attn --no-build-isolation, which is minillm's extra `flash`",
    ),
    "flash_attention_3": ("flash-attn-3", "it is built from the folder hopper/ of the flash-attention sources"),
    "flash_attention_4": ("flash-attn-4", "pip install flash-attn-4"),
}


def student_form(facts: Facts, student: StudentConfig) -> Iterator[Found]:
    """What each `init` needs, and keys that belong to another one."""
    written = facts.data.get("student", {})
    for key, init in OF_INIT.items():
        # one that is inherited may stand beside another init
        together = "init" not in written or facts.together(f"student.{key}", "student.init")
        if written.get(key) is not None and student.init != init and together:
            yield Found(f"student.{key}", f"has no effect without init: {init}", ("student.init",))
    if student.init == "prune" and student.layers is None:
        yield Found(
            "student.layers", "missing: which layers init: prune keeps, as a list, or how many", ("student.init",)
        )
    if student.path is not None:
        return
    if student.init != "random":
        message = f"missing: init: {student.init} takes the weights of a model"
        yield Found("student.path", message, ("student.init",))
        return
    if student.config is None:
        yield Found("student.config", "missing: the architecture of init: random, or a `path` to take it from")
    elif "model_type" not in student.config:
        yield Found("student.config", "without a `path` the architecture needs its model_type (llama, gpt2, ...)")
    if student.tokenizer is None:
        yield Found("student.tokenizer", "missing: a student without `path` has no tokenizer of its own; or say byte")


def pruned_layers(facts: Facts, student: StudentConfig) -> Iterator[Found]:
    """The layers to keep are there, each once."""
    if student.layers is None:
        return
    there = architecture_of(facts, "student", pruned=False).layers
    if isinstance(student.layers, int):
        if there is not None and student.layers > there:
            yield Found("student.layers", f"{student.path} has only {there} layers", ("student.path",))
        return
    if not student.layers:
        yield Found("student.layers", "must not be empty")
    repeated = [str(layer) for layer, count in Counter(student.layers).items() if count > 1]
    if repeated:
        yield Found("student.layers", f"names {', '.join(repeated)} more than once")
    beyond = [str(layer) for layer in student.layers if there is not None and layer >= there]
    if beyond:
        message = f"{student.path} has the layers 0 to {there - 1}, no {', '.join(beyond)}"
        yield Found("student.layers", message, ("student.path",))


def adapters(facts: Facts, student: StudentConfig) -> Iterator[Found]:
    """What trains them is installed, and they are not asked for where no loss would see them."""
    if student.lora is None:
        return
    if not _has("peft"):
        yield Found("student.lora", "needs peft, which is not installed: pip install -e '.[lora]' in minillm's folder")
    names = student.lora.target_modules
    for place, name in enumerate([] if isinstance(names, str) else names):
        last = name.rpartition(".")[2]
        refused = HEAD_REFUSED if last in HEADS else TABLE_REFUSED if last in TABLES else None
        if refused is not None:
            yield Found(("student", "lora", "target_modules", place), refused.format(name))


def installed(facts: Facts) -> Iterator[Found]:
    """The optional packages that the models' keys ask for."""
    for who in ("student", "teacher"):
        model = facts.groups.get(who)
        if model is None:
            continue
        distribution, how = _FLASH.get(model.attn_implementation, (None, ""))
        if distribution is not None and not _has(distribution):
            message = f"{model.attn_implementation} needs {distribution}, which is not installed: {how}"
            yield Found(f"{who}.attn_implementation", message)
        missing = [name for name in ("gguf", "accelerate") if not _has(name)]
        if (model.path or "").endswith(".gguf") and missing:
            message = f"a .gguf file needs {' and '.join(missing)}: pip install -e '.[gguf]' in minillm's folder"
            yield Found(f"{who}.path", message)


def quantized(facts: Facts, teacher: TeacherConfig | None) -> Iterator[Found]:
    """What quantises it is installed, and it is a folder of weights that are not quantised yet."""
    if teacher is None or teacher.quantization is None:
        return
    missing = [name for name in ("bitsandbytes", "accelerate") if not _has(name)]
    if missing:
        message = f"needs {' and '.join(missing)}, not installed: pip install -e '.[quantization]' in minillm's folder"
        yield Found("teacher.quantization", message)
    engine = facts.groups.get("engine")
    if engine is not None and engine.type == "deepspeed" and engine.replicate_teacher:
        message = "has no effect: a quantised teacher is whole on every rank anyway"
        yield Found("engine.replicate_teacher", message, ("teacher.quantization",))
    if teacher.path.endswith(".gguf"):
        message = "a .gguf file is read into whole weights; quantise a folder or a hub name, or leave this out"
        yield Found("teacher.quantization", message, ("teacher.path",))


def deepspeed_usable(facts: Facts, engine: Engine) -> Iterator[Found]:
    """DeepSpeed is there, and its own file says nothing else than the YAML."""
    if engine.type != "deepspeed":
        return
    if not _has("deepspeed"):
        message = "deepspeed needs the package of that name: pip install -e '.[deepspeed]' in minillm's folder"
        yield Found("engine.type", message)
    if engine.offload_param and engine.stage != 3:
        message = f"stage {engine.stage} leaves the weights whole on every rank; only stage 3 can keep them in the host"
        yield Found("engine.offload_param", message, ("engine.stage",))
    if engine.gather == "layers" and engine.stage != 3:
        message = f"stage {engine.stage} leaves the weights whole on every rank, so that nothing is gathered"
        yield Found("engine.gather", message, ("engine.stage",))
    if engine.replicate_teacher and engine.stage != 3:
        message = f"stage {engine.stage} has the teacher whole on every rank as it is"
        yield Found("engine.replicate_teacher", message, ("engine.stage",))
    try:
        given = read_deepspeed_file(facts.data["engine"].get("config"))
    except ValueError as problem:
        yield Found("engine.config", str(problem))
        return
    train = facts.groups.get("train")
    zero = given.get("zero_optimization", {})
    says = {
        "engine.stage": ("zero_optimization.stage", zero.get("stage"), engine.stage),
        "engine.offload_optimizer": (
            "zero_optimization.offload_optimizer.device",
            None if "offload_optimizer" not in zero else zero["offload_optimizer"].get("device") not in (None, "none"),
            engine.offload_optimizer,
        ),
        "engine.offload_param": (
            "zero_optimization.offload_param.device",
            None if "offload_param" not in zero else zero["offload_param"].get("device") not in (None, "none"),
            engine.offload_param,
        ),
    }
    if train is not None:
        says |= {
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
    for key, (name, theirs, ours) in says.items():
        if theirs not in (None, "auto", ours):
            yield Found(
                "engine.config",
                f"its {name} is {json.dumps(theirs)}, but {key} is {json.dumps(ours)}; leave it out there or say auto",
                (key,),
            )
    for name in ("optimizer", "scheduler", "fp16", "train_batch_size"):
        if given.get(name, "auto") != "auto":
            yield Found("engine.config", f"its {name} has no effect here: `train` says that; leave it out there")
    for part in ("offload_optimizer", "offload_param"):
        device = zero.get(part, {}).get("device")
        if getattr(engine, part) and device not in (None, "none", "cpu"):
            message = f"its zero_optimization.{part}.device is {json.dumps(device)}; minillm offloads to the host"
            yield Found("engine.config", message)


def _has(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
