"""Advice for a plan that does not fit: keys to change, cheapest first, each tried by planning again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minillm import UserError
from minillm.config.loader.run_plan import RunPlan, load_run
from minillm.config.models import TeacherConfig, teachers_of
from minillm.config.root import StageConfig
from minillm.planning.planner import PlannedRun, plan_run

GIB = 2**30


@dataclass(frozen=True)
class Change:
    """Keys to set after those of the changes before it, and the peak that follows."""

    overrides: list[str]
    why: str
    peak_bytes: int
    fits: bool

    def __str__(self) -> str:
        return f"{' '.join(self.overrides)}  ({self.why}; peak {self.peak_bytes / GIB:,.2f} GiB)"


def advise(plan: RunPlan, run: PlannedRun, overrides: Sequence[str]) -> list[Change]:
    """List changes, in order, until the plan fits: none where it does. A change that does not lower the peak is left out."""
    changes: list[Change] = []
    current, taken = run, list(overrides)
    while not current.fits:
        step = next(_improvements(plan.files, current, taken), None)
        if step is None:
            break
        keys, why, current = step
        taken += keys
        changes.append(Change(keys, why, current.peak_bytes, current.fits))
    return changes


def _improvements(
    files: Sequence[Path], current: PlannedRun, taken: list[str]
) -> Iterator[tuple[list[str], str, PlannedRun]]:
    plan = load_run(files, taken)
    worst = max(current.stages, key=lambda stage: stage.peak.most_bytes)
    config = next(stage.config for stage in plan.stages if stage.name == worst.name)
    prefix = f"stages.{worst.name}." if plan.document.get("stages") else ""
    for keys, why in _candidates(config, worst.peak.phase, current.world_size):
        written = [prefix + key for key in keys]
        try:
            changed = plan_run(load_run(files, [*taken, *written]), gpu=current.gpu.name, world_size=current.world_size)
        except UserError:  # not for this configuration
            continue
        if changed.peak_bytes < current.peak_bytes:
            yield written, why, changed


def _candidates(config: StageConfig, phase: str, world_size: int) -> Iterator[tuple[list[str], str]]:
    """Candidates for lowering the peak of this phase, cheapest first."""
    train, rollout, engine = config.train, config.rollout, config.engine
    if config.save.in_background:  # its copy is in the host's memory, which is the device's where that is a CPU
        yield ["save.in_background=false"], "the run waits while a checkpoint is written"
    if phase != "rollout" and train.packing == "on":
        yield ["train.packing=auto"], "the same losses, without a mask of all pairs of a micro-batch's tokens"
    if phase == "update" and not train.gradient_checkpointing:
        yield ["train.gradient_checkpointing=true"], "the same numbers, about a third more time in the update"
    local = {key: one for key, one in teachers_of(config.teacher_side).items() if isinstance(one, TeacherConfig)}
    exact = [f"{key}.dtype=bfloat16" for key, one in local.items() if one.dtype == "float32"]
    if exact:
        yield exact, "halves the teacher, which is never trained"
    if engine.type == "deepspeed" and engine.replicate_teacher:
        yield ["engine.replicate_teacher=false"], "one shard of the teacher on each rank, gathered for every collection"
    if engine.type == "deepspeed":
        if engine.stage < 3 and world_size > 1:
            yield [f"engine.stage={engine.stage + 1}"], "shards more of the student, for more communication"
    collecting = phase in ("rollout", "scoring", "evaluation")
    group, side_by_side = ("eval", config.eval.batch_size) if phase == "evaluation" else ("rollout", rollout.batch_size)
    fewer = [f"{group}.batch_size={side_by_side // 2}"], "the same answers, decoded fewer at a time"
    if collecting and side_by_side > 8:
        yield fewer
    if collecting and engine.type == "deepspeed" and engine.stage == 3 and engine.gather == "whole":
        yield (
            ["engine.gather=layers"],
            "gathers sharded weights one layer at a time in every pass; much slower sampling",
        )
    if collecting and 1 < side_by_side <= 8:
        yield fewer
    micro = train.per_device_train_batch_size
    if phase not in ("rollout", "evaluation") and micro > 1 and micro % 2 == 0:
        keys = [
            f"train.per_device_train_batch_size={micro // 2}",
            f"train.gradient_accumulation_steps={train.gradient_accumulation_steps * 2}",
        ]
        yield keys, "the same step in smaller micro-batches"
    if engine.type == "deepspeed" and not engine.offload_optimizer:
        yield ["engine.offload_optimizer=true"], "moments and master weights in the host's memory; slower steps"
    if engine.type == "deepspeed" and engine.stage == 3 and not engine.offload_param:
        yield ["engine.offload_param=true"], "weights in the host's memory; much slower"
    if len(local) > 1 and config.teachers_by.in_memory == "all":
        yield (
            ["teachers_by.in_memory=one"],
            "the largest teacher and the heads of the others; each is opened for a buffer, or for teachers_by.turn_steps steps",
        )
    if local and all(one.quantization is None for one in local.values()):
        yield (
            [f"{key}.quantization=nf4" for key in local],
            "a quarter of what the teacher's layers take in bfloat16; its probabilities move a little",
        )
    if engine.type == "torch" and world_size == 1 and all(one.device is None for one in local.values()):
        home = "cuda:0" if engine.device in ("auto", "cuda") else engine.device
        others = [place for place in (f"cuda:{number}" for number in range(len(local) + 1)) if place != home]
        if local:
            places = [f"{key}.device={place}" for key, place in zip(local, others, strict=False)]
            yield places, "on a GPU of its own beside the student's, which keeps a copy of its head"
    if engine.type == "torch" and world_size == 1:
        yield (
            ["engine.type=deepspeed", "engine.stage=3", "engine.offload_optimizer=true"],
            "weights and moments sharded or in the host's memory: pip install -e '.[deepspeed]'",
        )
