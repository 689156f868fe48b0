"""The plan of a configuration: every stage simulated, sharded, and held against a device."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from minillm import UserError
from minillm.config.loader.run_plan import RunPlan, Stage
from minillm.config.models import AnyTeacherConfig, CachedTeacherConfig, ServedTeacherConfig, TeacherConfig, teachers_of
from minillm.config.root import StageConfig
from minillm.planning.architectures import Architectures
from minillm.planning.cached_teacher import CacheSize, TeacherHead, cache_size, head_of
from minillm.planning.gpus import Gpu, find_gpu
from minillm.planning.memory import PhaseMemory, memory_of
from minillm.planning.places import HOME, HOST, kind_of, place_of
from minillm.planning.setting import Setting
from minillm.planning.several_teachers import BesideTeacher, Several
from minillm.planning.sharding import Sharding, sharding_of
from minillm.planning.shown_pictures import NotShown, ShownPictures, shown_pictures
from minillm.planning.simulate import PHASES, Simulation, simulate
from minillm.planning.speed import Speed, speed_of
from minillm.planning.work import NothingToPlan, Work, work_of

PICTURES = "the passes over the prompts' pictures"  # in what is said not to be counted
WORLD_SIZES = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage, on one rank."""

    name: str
    method: str
    sharding: Sharding
    work: Work
    simulation: Simulation
    memory: list[PhaseMemory]
    # the most of the update, bytes, with gradient_checkpointing and without; None with it where the architecture refuses it
    activations: Callable[[bool], int | None]
    speed: Speed | None  # None where the stage takes no step
    memory_on: Callable[[int], list[PhaseMemory]]  # on so many ranks; UserError where the buffer does not divide
    not_counted: tuple[str, ...]  # what the method needs beside what the plan holds
    student_side: str  # student, reference or teacher: the model of the numbers called the student's
    # teacher -> cached or served, and where: of its weights the head alone is loaded
    elsewhere: dict[str, tuple[str, str]] = field(default_factory=dict)
    cache: CacheSize | None = None  # of a stage that writes one

    @property
    def peak(self) -> PhaseMemory:
        """The phase with the fullest device."""
        return max(self.memory, key=lambda memory: memory.most_bytes)

    def smallest_world_size(self, gpu: Gpu) -> int | None:
        """Return the fewest ranks that fit, a power of two; None where none of those tried does."""
        for size in WORLD_SIZES if self.sharding.stage else (1,):
            try:
                phases = self.memory_on(size)
            except UserError:
                continue
            if max(phase.most_bytes for phase in phases) <= gpu.usable_bytes:
                return size
        return None


@dataclass(frozen=True)
class PlannedRun:
    """The plans of all stages, on one kind of device."""

    gpu: Gpu
    world_size: int
    stages: list[StagePlan]
    unplanned: dict[str, str]  # stage -> why there is nothing to plan in it

    @property
    def peaks(self) -> dict[str, int]:
        """The most bytes on every device of a rank: HOME is the student's, others hold a teacher."""
        found: dict[str, int] = {}
        for phase in (phase for stage in self.stages for phase in stage.memory):
            found |= {place: max(size, found.get(place, 0)) for place, size in phase.peaks.items()}
        return found

    @property
    def peak_bytes(self) -> int:
        """The most bytes on the fullest device."""
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        return self.peak_bytes <= self.gpu.usable_bytes


def plan_run(plan: RunPlan, *, gpu: str = "H100-80GB", world_size: int = 1) -> PlannedRun:
    """Plan every stage.

    Raises UserError for an unknown GPU or architecture, for what one process cannot do, and where no stage has anything
    to plan.
    """
    device = find_gpu(gpu)
    _require_named_gpu(plan, device)
    architectures = Architectures(plan)
    stages, unplanned = [], {}
    for stage in plan.stages:
        try:
            stages.append(_plan_stage(stage, architectures, device, world_size, plan.output_dir))
        except NothingToPlan as reason:
            unplanned[stage.name] = str(reason)
    if not stages:
        raise UserError("\n".join(f"stage {name!r}: {reason}" for name, reason in unplanned.items()))
    return PlannedRun(device, world_size, stages, unplanned)


def _require_named_gpu(plan: RunPlan, gpu: Gpu) -> None:
    """Raises UserError for a teacher on a GPU, of which nothing is known where the plan is for a CPU."""
    for stage in plan.stages:
        for key, teacher in teachers_of(stage.config.teacher_side).items():
            place = place_of(teacher, stage.config.engine, gpu.kind)
            if gpu.kind == "cpu" and place != HOME:
                raise UserError(
                    f"--gpu cpu: {key}.device is {place}; name its kind with --gpu, or set {key}.device to cpu"
                )


def planned_peak_gib(plan: RunPlan, stage: Stage, device: torch.device, *, world_size: int) -> float | None:
    """Return the most that one rank of a stage would allocate on such a device, the student's, in GiB; None where it cannot be
    planned."""
    architectures = Architectures(plan)
    try:
        kind, asked = device.type, stage.config.train.gradient_checkpointing
        student, teacher, head, several = _models_of(stage, architectures, plan.output_dir, kind)
        shown, _ = _shown(stage, student, architectures)
        setting = Setting.of(stage.config, checkpointing=asked, shown=shown, kind=kind)
        work, sharding = work_of(stage.config, world_size), sharding_of(stage.config, world_size)
        simulation = simulate(setting, work.moment, student, teacher, device, head=head, several=several)
    except UserError:
        return None
    return max(phase.device_bytes for phase in memory_of(simulation, work, sharding, device)) / 2**30


def _models_of(
    stage: Stage, architectures: Architectures, output_dir: Path, kind: str
) -> tuple[PreTrainedConfig, PreTrainedConfig | None, TeacherHead | None, Several | None]:
    """The models of a stage: on the student's side, and on the teacher's its architecture or its head, of several those of
    the first, and the others. A teacher alone stands on the student's side."""
    config, teacher = stage.config, architectures.teacher(stage)
    if config.method.needs().alone:
        return teacher, None, None, None
    student = architectures.student(stage)
    if not config.teachers:
        return student, teacher, head_of(config.teacher, architectures, output_dir), None
    # those whose weights are loaded first, as minillm.planning.setting takes the first of them
    named = sorted(config.teachers.items(), key=lambda one: not isinstance(one[1], TeacherConfig))
    found = [
        replace(_beside(name, one, architectures, output_dir), place=place_of(one, config.engine, kind))
        for name, one in named
    ]
    first, *beside = found
    by, divided = config.teachers_by, config.teacher_side.weights is None
    turn_steps = by.turn_steps if by.in_memory == "one" else None
    return student, first.architecture, first.head, Several(first.name, tuple(beside), divided, turn_steps)


def _beside(name: str, config: AnyTeacherConfig, architectures: Architectures, output_dir: Path) -> BesideTeacher:
    if not isinstance(config, TeacherConfig):
        return BesideTeacher(name, None, "", head_of(config, architectures, output_dir))
    architecture = architectures.of(config)
    keys = config.dtype, config.attn_implementation, config.quantization
    return BesideTeacher(name, architecture, architecture.to_json_string(), None, *keys)


def _plan_stage(stage: Stage, architectures: Architectures, gpu: Gpu, world_size: int, output_dir: Path) -> StagePlan:
    config, needs = stage.config, stage.config.method.needs()
    # a teacher that is the only model is computed with where it is
    home = place_of(config.teacher, config.engine, gpu.kind) if needs.alone else HOME
    device = kind_of(home, torch.device(gpu.kind))
    student, teacher, head, several = _models_of(stage, architectures, output_dir, gpu.kind)

    asked = config.train.gradient_checkpointing
    shown, not_shown = _shown(stage, student, architectures)

    def simulated(work: Work, checkpointing: bool = asked, phases: tuple[str, ...] = PHASES) -> Simulation:
        setting = Setting.of(config, checkpointing=checkpointing, shown=shown, kind=gpu.kind)
        return simulate(setting, work.moment, student, teacher, device, head=head, several=several, phases=phases)

    def activations(checkpointing: bool) -> int | None:
        try:
            update = simulated(work, checkpointing, PHASES if checkpointing == asked else ("update",))
        except UserError:
            if checkpointing == asked or not checkpointing:
                raise
            return None
        return update.phases["update"].most("activations")

    def memory(size: int) -> list[PhaseMemory]:
        work = work_of(config, size)
        return [one.at(home) for one in memory_of(simulated(work), work, sharding_of(config, size), device)]

    sharding, work = sharding_of(config, world_size), work_of(config, world_size)
    if shown is not None:
        try:
            simulated(work)
        except UserError as error:  # which may be of the pictures: without them there is a plan all the same
            shown, not_shown = None, (f"{PICTURES}: {error}",)
    simulation = simulated(work)
    simulation = replace(simulation, places=tuple(sorted({*simulation.places, home} - {HOME})))
    known = replace(gpu, bf16_tflops=None) if HOST in simulation.places else gpu  # how fast a host is, nobody knows
    return StagePlan(
        name=stage.name,
        method=config.method.name,
        sharding=sharding,
        work=work,
        simulation=simulation,
        memory=memory(world_size),
        activations=activations,
        speed=speed_of(simulation, work, sharding, known, bf16=config.train.bf16, checkpointing=asked)
        if work.terms
        else None,
        memory_on=memory,
        not_counted=(*not_shown, *_not_counted(config)),
        student_side="teacher" if needs.alone else "student" if needs.reference is None else "reference",
        elsewhere={
            key.replace("teachers.", "teacher "): (one.type, _place_of(one))
            for key, one in teachers_of(config.teacher_side).items()
            if not isinstance(one, TeacherConfig)
        },
        cache=cache_size(stage, architectures, output_dir),
    )


def _place_of(teacher: CachedTeacherConfig | ServedTeacherConfig) -> str:
    return teacher.path if isinstance(teacher, CachedTeacherConfig) else ", ".join(teacher.urls)


def _shown(
    stage: Stage, student: PreTrainedConfig, architectures: Architectures
) -> tuple[ShownPictures | None, tuple[str, ...]]:
    """The pictures that passes show, and what is said of those that are not shown."""
    try:
        return shown_pictures(stage, student, architectures), ()
    except NotShown as reason:
        return None, (f"{PICTURES}: {reason}",)


def _not_counted(config: StageConfig) -> Iterator[str]:
    needs = config.method.needs()
    counted = ("student",) if needs.teacher_lora is None else ("student", "teacher")
    if any(term.features for term in needs.terms):
        counted = (*counted, "projector")
    beside = [name for name in needs.trains if name not in counted]
    if beside:
        yield f"what the method trains beside the student: {', '.join(beside)}"
    if config.teachers_by is not None and config.teachers_by.in_memory == "one":
        every = "collection" if needs.buffered else f"{config.teachers_by.turn_steps} steps"
        yield f"opening the teachers' weights one after the other, for every {every} and every evaluation: how long a disk takes"
    if needs.whole_documents:
        yield (
            "in the host's memory about 100 bytes for each document of the corpus, and the texts of some hundreds at a time"
        )
