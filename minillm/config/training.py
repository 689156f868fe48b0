"""`train`, `engine`, `save` and `log`: the loop. Keys of `train` are spelled as in transformers.TrainingArguments."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from minillm.config.keys import FilesPath, Strict, default_type
from minillm.config.models import TeacherConfig, TeacherSide, teachers_of

Positive = Annotated[int, Field(ge=1)]
Packing = Literal["auto", "on", "off"]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_min_lr", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "warmup_stable_decay",
]  # fmt: skip


@dataclass(frozen=True)
class ScheduleKeys:
    """The arguments of one of transformers' schedules."""

    takes: tuple[str, ...] = ()  # keys of lr_scheduler_kwargs
    needs_one_of: tuple[str, ...] = ()
    counts_steps: bool = True  # the curve depends on how many steps there will be
    warms_up: bool = True  # it takes warmup_steps


SCHEDULES: dict[str, ScheduleKeys] = {
    "linear": ScheduleKeys(),
    "cosine": ScheduleKeys(takes=("num_cycles",)),
    "cosine_with_min_lr": ScheduleKeys(
        takes=("num_cycles", "min_lr", "min_lr_rate"), needs_one_of=("min_lr", "min_lr_rate")
    ),
    "polynomial": ScheduleKeys(takes=("lr_end", "power")),
    "constant": ScheduleKeys(counts_steps=False, warms_up=False),
    "constant_with_warmup": ScheduleKeys(counts_steps=False),
    "inverse_sqrt": ScheduleKeys(takes=("timescale",), counts_steps=False),
    "warmup_stable_decay": ScheduleKeys(
        takes=("num_decay_steps", "num_stable_steps", "min_lr_ratio", "num_cycles"), needs_one_of=("num_decay_steps",)
    ),
}


class TrainConfig(Strict):
    """The optimiser, its schedule, and the length of training."""

    max_steps: Positive | None = Field(None, description="Optimiser steps; one of the four limits is required")
    num_train_epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Passes over the prompts; with max_steps, the one that ends first counts"
    )
    max_seconds: Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern="^stage:.")] | None = Field(
        None,
        description="Stop after so many seconds of training (evaluation and saving not counted), or after as many as an "
        "earlier stage took: stage:NAME. Such a run does not repeat bit for bit",
    )
    max_student_tokens: Positive | None = Field(
        None,
        description="Stop at the step after which so many predictions of the student have received a gradient, inner epochs "
        "counted; those of another model that is trained with it are not",
    )
    per_device_train_batch_size: Positive = Field(8, description="Answers in a micro-batch on each rank")
    gradient_accumulation_steps: Positive = Field(1, description="Micro-batches in a step on each rank")
    packing: Packing = Field(
        "auto",
        description="Put the sequences of a micro-batch end to end, each seeing itself alone, so that nothing is computed for "
        "padding: in updates, scoring, teacher passes and evaluations. auto: with attn_implementation flash_attention_* and "
        "flex_attention; on: with sdpa and eager too, under a mask of all pairs of a micro-batch's tokens; off: never. "
        "Batches that show pictures stay as they are",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-6, description="The highest learning rate of the schedule")
    lr_scheduler_type: Scheduler = Field(
        "constant_with_warmup", description="The name of a schedule of transformers.get_scheduler"
    )
    lr_scheduler_kwargs: dict[str, float] = Field({}, description="Arguments of that schedule")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Steps in which the learning rate rises from 0")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.01, description="AdamW's weight decay of matrices; biases and norms have none"
    )
    adam_beta1: Fraction = Field(0.9, description="AdamW's decay rate of the mean gradient")
    adam_beta2: Fraction = Field(0.95, description="AdamW's decay rate of the mean squared gradient")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="Added to the square root of the latter")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="A gradient with a larger 2-norm is scaled down to it; null: no gradient is"
    )
    router_aux_loss_coef: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="Weight of the load-balancing loss of a student that is a mixture of experts, added to the loss of "
        "whatever method once: the architecture's own formula, over all tokens that the student is trained on",
    )
    bf16: bool = Field(
        False,
        description="Train in bfloat16: with engine.type torch under autocast, while answers are sampled and scored in the "
        "dtype of the weights; with deepspeed in bfloat16 weights, with fp32 copies in the optimiser",
    )
    gradient_checkpointing: bool = Field(
        False, description="Keep only the inputs of layers and compute the rest again: less memory, more time"
    )


class TorchEngine(Strict):
    """One process: a CPU or one GPU."""

    type: Literal["torch"] = "torch"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        "auto", description="auto (a GPU where there is one), cpu, cuda or cuda:N"
    )
    backend: Literal["auto", "torch", "triton"] = Field(
        "auto", description="The backend of the fused losses in the update (minillm.losses); scoring uses auto"
    )


class DeepSpeedEngine(Strict):
    """ZeRO in one process or many, started by torchrun, deepspeed or Slurm."""

    type: Literal["deepspeed"]
    stage: Literal[1, 2, 3] = Field(
        3, description="Sharded are: 1 the optimiser, 2 gradients as well, 3 weights as well"
    )
    offload_optimizer: bool = Field(False, description="Keep the optimiser in the host's memory")
    offload_param: bool = Field(False, description="Stage 3: keep the weights in the host's memory")
    gather: Literal["whole", "layers"] = Field(
        "whole",
        description="Stage 3, while sampling, scoring and evaluating: whole gathers all weights on every rank once; layers "
        "gathers one layer after the other in every pass, which takes the least memory and the most time",
    )
    replicate_teacher: bool = Field(
        False, description="Stage 3: replicate the teacher on every rank, as a quantised one always is"
    )
    config: FilesPath | None = Field(None, description="A DeepSpeed JSON file for settings that these keys do not have")
    backend: Literal["auto", "torch", "triton"] = Field(
        "auto", description="The backend of the fused losses in the update (minillm.losses); scoring uses auto"
    )


Engine = Annotated[TorchEngine | DeepSpeedEngine, Field(discriminator="type"), default_type("torch")]


class SaveConfig(Strict):
    """Checkpoints to resume from."""

    steps: Positive | None = Field(None, description="Steps between checkpoints; there always is one at the end")
    keep: Positive = Field(2, description="The number of checkpoints that stay on disk")
    best: bool = Field(True, description="Keep the model with the best eval.metric in best/")
    in_background: bool = Field(
        True,
        description="Write checkpoints and best/ while the next steps are taken, from a copy in the host's memory, which takes as "
        "much as the student's weights and the optimiser, of several ranks its own shard of it; false: the run waits. The last "
        "checkpoint of a stage is waited for",
    )


class LogConfig(Strict):
    """Records that are written while training. metrics.jsonl always is."""

    steps: Positive = Field(1, description="Steps between lines of metrics")
    report_to: list[Literal["tensorboard"]] = Field(["tensorboard"], description="[] for metrics.jsonl alone")


def shards_student(engine: TorchEngine | DeepSpeedEngine) -> bool:
    """True where each rank will hold only a shard of every weight of the student."""
    return engine.type == "deepspeed" and engine.stage == 3


def shards_teacher(engine: TorchEngine | DeepSpeedEngine, teacher: TeacherSide | None) -> bool:
    """True where each rank will hold only a shard of every weight of the teacher, or of those of several whose weights are
    loaded. A quantised one is never sharded."""
    plain = [
        one for one in teachers_of(teacher).values() if isinstance(one, TeacherConfig) and one.quantization is None
    ]
    return shards_student(engine) and not engine.replicate_teacher and bool(plain)
