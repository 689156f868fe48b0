"""`train`, `engine`, `save`, `log`: how the loop runs. `train` is spelled as transformers.TrainingArguments."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from minillm.config.keys import FilesPath, Strict, default_type
from minillm.config.models import TeacherConfig

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Scheduler = Literal[
    "linear", "cosine", "cosine_with_min_lr", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "warmup_stable_decay",
]  # fmt: skip


@dataclass(frozen=True)
class ScheduleKeys:
    """What transformers.get_scheduler asks of a schedule beyond warmup_steps."""

    takes: tuple[str, ...] = ()  # of lr_scheduler_kwargs
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
    """The optimiser, its schedule, and how long."""

    max_steps: Positive | None = Field(None, description="Optimiser steps; one of the four limits is required")
    num_train_epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Passes over the prompts; with max_steps, whichever ends first"
    )
    max_seconds: Annotated[float, Field(gt=0)] | Annotated[str, Field(pattern="^stage:.")] | None = Field(
        None,
        description="Stop after so much training time (evaluation and saving not counted), or after as much as an "
        "earlier stage took: stage:NAME. Such a run does not repeat bit for bit",
    )
    max_student_tokens: Positive | None = Field(
        None, description="Stop at the step after which so many predictions received a gradient, inner epochs counted"
    )
    per_device_train_batch_size: Positive = Field(8, description="Answers of a micro-batch on each rank")
    gradient_accumulation_steps: Positive = Field(1, description="Micro-batches of a step on each rank")
    learning_rate: Annotated[float, Field(gt=0)] = Field(5e-6, description="The highest of the schedule")
    lr_scheduler_type: Scheduler = Field("constant_with_warmup", description="As transformers.get_scheduler names them")
    lr_scheduler_kwargs: dict[str, float] = Field({}, description="As transformers.get_scheduler takes them")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="Steps in which the learning rate rises from 0")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="On matrices; never on biases or norms")
    adam_beta1: Fraction = Field(0.9, description="AdamW's decay of the mean gradient")
    adam_beta2: Fraction = Field(0.95, description="AdamW's decay of the mean squared gradient")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="Added to the root of the latter")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        1.0, description="A gradient with a larger 2-norm is scaled down to it; null: none is"
    )
    bf16: bool = Field(
        False,
        description="Train in bfloat16: with engine.type torch under autocast, and answers are sampled and scored in the "
        "dtype of the weights; with deepspeed in bfloat16 weights, over fp32 ones in the optimiser",
    )
    gradient_checkpointing: bool = Field(
        False, description="Keep the inputs of layers alone and compute the rest again: less memory, more time"
    )


class TorchEngine(Strict):
    """One process: a CPU or one GPU."""

    type: Literal["torch"] = "torch"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = Field(
        "auto", description="auto (a GPU where there is one), cpu, cuda or cuda:N"
    )
    backend: Literal["auto", "torch", "triton"] = Field(
        "auto", description="Which fused losses the update takes (minillm.losses); scoring takes those of auto"
    )


class DeepSpeedEngine(Strict):
    """ZeRO in one process or many, started by torchrun, deepspeed or Slurm."""

    type: Literal["deepspeed"]
    stage: Literal[1, 2, 3] = Field(3, description="What is sharded: 1 the optimiser, 2 gradients too, 3 weights too")
    offload_optimizer: bool = Field(False, description="Keep the optimiser in the memory of the host")
    offload_param: bool = Field(False, description="Stage 3: keep the weights in the memory of the host")
    gather: Literal["whole", "layers"] = Field(
        "whole",
        description="Stage 3, while sampling, scoring and evaluating: whole brings all weights to every rank once; layers "
        "brings one layer after the other in every pass, which needs the least memory and the most time",
    )
    replicate_teacher: bool = Field(
        False, description="Stage 3: keep the teacher whole on every rank, as a quantised one always is"
    )
    config: FilesPath | None = Field(None, description="A DeepSpeed JSON for what these keys do not say")
    backend: Literal["auto", "torch", "triton"] = Field(
        "auto", description="Which fused losses the update takes (minillm.losses); scoring takes those of auto"
    )


Engine = Annotated[TorchEngine | DeepSpeedEngine, Field(discriminator="type"), default_type("torch")]


class SaveConfig(Strict):
    """Checkpoints to resume from."""

    steps: Positive | None = Field(None, description="A checkpoint every so many steps; one is always left at the end")
    keep: Positive = Field(2, description="How many checkpoints stay on disk")
    best: bool = Field(True, description="Keep the model with the best eval.metric in best/")


class LogConfig(Strict):
    """What is written while training. metrics.jsonl always is."""

    steps: Positive = Field(1, description="A line of metrics every so many steps")
    report_to: list[Literal["tensorboard"]] = Field(["tensorboard"], description="[] for metrics.jsonl alone")


def shards_student(engine: TorchEngine | DeepSpeedEngine) -> bool:
    """Whether each rank will hold only a shard of every weight of the student."""
    return engine.type == "deepspeed" and engine.stage == 3


def shards_teacher(engine: TorchEngine | DeepSpeedEngine, teacher: TeacherConfig | None) -> bool:
    """Whether each rank will hold only a shard of every weight of the teacher. A quantised one is never sharded."""
    never = teacher is None or teacher.quantization is not None
    return shards_student(engine) and not engine.replicate_teacher and not never
