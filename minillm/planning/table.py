"""The plan as rich tables, and as plain data for --json."""

import json
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from minillm.planning import gpus
from minillm.planning.advice import Change
from minillm.planning.cached_teacher import CacheSize
from minillm.planning.ledger import PARTS
from minillm.planning.places import HOME, HOST
from minillm.planning.planner import PlannedRun, StagePlan
from minillm.planning.speed import Speed, flops_per_token

GIB = 2**30


def render(run: PlannedRun, advice: list[Change]) -> RenderableType:
    """Lay out a plan for the terminal."""
    parts: list[RenderableType] = []
    for stage in run.stages:
        title = f"stage {stage.name}: {stage.method}" if len(run.stages) > 1 else stage.method
        where = f"{run.gpu.name}, on each of {run.world_size} ranks" if run.world_size > 1 else run.gpu.name
        heading = Text(f"memory in GiB on {where}, at each phase's worst moment")
        parts += [Text(title, style="bold"), _models(stage), heading, _memory(stage), *_notes(stage, run.gpu)]
    parts += [Text(f"stage {name} is not in the plan: {reason}") for name, reason in run.unplanned.items()]
    parts.append(_verdict(run))
    parts += [Text(f"  {place}. {change}") for place, change in enumerate(advice, 1)]
    if advice and not advice[-1].fits:
        parts.append(Text("  That is still not enough: a smaller student or teacher, or a GPU with more memory."))
    return Group(*parts)


def as_data(run: PlannedRun, advice: list[Change]) -> dict[str, Any]:
    """Return the plan as plain data for programs, in bytes, FLOPs and seconds."""
    beside = {place: size for place, size in run.peaks.items() if place != HOME}
    return {
        "gpu": run.gpu.name,
        "gpu_memory_bytes": int(run.gpu.memory_gib * GIB),
        "usable_bytes": run.gpu.usable_bytes,
        "world_size": run.world_size,
        "peak_bytes": run.peak_bytes,
        **({"peak_bytes_beside": beside} if beside else {}),
        "fits": run.fits,
        "stages": {stage.name: _stage_data(stage, run.gpu) for stage in run.stages},
        **({"unplanned": run.unplanned} if run.unplanned else {}),
        "advice": [
            {"changes": change.overrides, "peak_bytes": change.peak_bytes, "fits": change.fits} for change in advice
        ],
        "assumptions": list(assumptions()),
    }


def to_json(run: PlannedRun, advice: list[Change]) -> str:
    """Write `as_data` as JSON."""
    return json.dumps(as_data(run, advice), indent=2)


def assumptions() -> Iterator[str]:
    """List the assumptions behind the numbers."""
    yield "memory: every prompt and answer at its longest, PyTorch's allocations without what its allocator leaves unused"
    yield f"fits: peak at most {gpus.USABLE_MEMORY:.0%} of the device's memory"
    yield (
        f"time (an estimate): {gpus.MFU:.0%} of the data sheet's FLOP/s, {gpus.BANDWIDTH_USE:.0%} of its memory bandwidth "
        f"while decoding, {gpus.LINK_USE:.0%} of the link between GPUs of one node, communication not overlapped"
    )


def _stage_data(stage: StagePlan, gpu: gpus.Gpu) -> dict[str, Any]:
    simulation, speed, shown = stage.simulation, stage.speed, stage.simulation.shown
    several = simulation.teachers if len(simulation.teachers) > 1 else {}
    return {
        "method": stage.method,
        "parameters": {
            "student": simulation.student.parameters,
            "student_trained": simulation.student.trained,
            "teacher": None if simulation.teacher is None else simulation.teacher.parameters,
            **({} if stage.student_side == "student" else {stage.student_side: simulation.student.parameters}),
        },
        "vocab_size": simulation.vocab_size,
        "peak_phase": stage.peak.phase,
        "memory_bytes": {
            phase.phase: {
                "device": {part: size for part, size in phase.device.items() if size},
                "host": {part: size for part, size in phase.host.items() if size},
                **{
                    place: {part: size for part, size in parts.items() if size} for place, parts in phase.beside.items()
                },
            }
            for phase in stage.memory
        },
        "activations_bytes": {
            "without_checkpointing": stage.activations(False),
            "with_checkpointing": stage.activations(True),
        }
        if stage.work.terms
        else None,
        "loss_bytes": {
            name: {
                "rows": shape.rows,
                "chunk_rows": shape.chunk,
                "fused_logits": shape.logits_bytes,
                "full_logits": shape.full_logits_bytes(gradient=name not in ("scoring", "evaluation")),
            }
            for name, shape in simulation.losses.items()
        },
        "flops_per_step": speed
        and {
            "rollout": speed.rollout_flops,
            "scoring": speed.scoring_flops,
            "update": speed.update_flops,
        },
        "estimated_seconds_per_step": speed and speed.seconds,
        **({} if stage.work.terms else {"flops_per_token": sum(_without_steps(stage))}),
        "smallest_world_size": stage.smallest_world_size(gpu),
        **({"teachers": {name: one.parameters for name, one in several.items()}} if several else {}),
        **{f"{kind}_{name.replace(' ', '_')}": place for name, (kind, place) in stage.elsewhere.items()},
        **({} if stage.cache is None else {"cache": {**vars(stage.cache), "bytes": stage.cache.total}}),
        **(
            {}
            if shown is None
            else {"pictures": {"in_a_prompt": shown.count, "tokens_each": shown.tokens, "which": shown.said}}
        ),
        **({"not_counted": list(stage.not_counted)} if stage.not_counted else {}),
    }


def _models(stage: StagePlan) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "parameters", "layers", "hidden", "KV cache a token", "vocabulary in use"):
        table.add_column(name, justify="right" if name else "left")
    sizes = {stage.student_side: stage.simulation.student}
    for name, size in stage.simulation.teachers.items():
        sizes[f"{name}'s head" if name in stage.elsewhere else name] = size
    for who, size in sizes.items():
        cache = f"{size.kv_bytes_per_token / 1024:,.0f} KiB" if size.kv_bytes_per_token else "-"
        table.add_row(
            who,
            f"{size.trained:,} trained of {size.parameters:,}"
            if 0 < size.trained < size.parameters
            else f"{size.parameters:,}",
            str(size.layers),
            f"{size.hidden_size:,}",
            cache,
            f"{stage.simulation.vocab_size:,}",
        )
    return table


def _memory(stage: StagePlan) -> Table:
    table = Table()
    table.add_column("part")
    for phase in stage.memory:
        peak = phase is stage.peak
        table.add_column(phase.phase + (" (peak)" if peak else ""), justify="right", style="bold" if peak else None)
    for part in PARTS:
        if any(phase.device[part] for phase in stage.memory):
            table.add_row(part, *(_gib(phase.device[part]) for phase in stage.memory))
    table.add_section()
    beside = stage.simulation.places
    if not (beside and stage.student_side == "teacher"):  # of a teacher that is alone nothing is on another device
        name = "the student's device" if beside else "device"
        table.add_row(name, *(_gib(phase.device_bytes) for phase in stage.memory))
    for place in (one for one in beside if one != HOST):
        table.add_section()
        for part in PARTS:
            if any(phase.beside[place][part] for phase in stage.memory):
                table.add_row(f"{part} on {place}", *(_gib(phase.beside[place][part]) for phase in stage.memory))
        table.add_section()
        table.add_row(place, *(_gib(phase.peaks[place]) for phase in stage.memory))
    if any(phase.host_bytes for phase in stage.memory):
        table.add_row("host memory, a rank", *(_gib(phase.host_bytes) for phase in stage.memory))
    return table


def _notes(stage: StagePlan, gpu: gpus.Gpu) -> Iterator[Text]:
    if stage.work.terms:
        without, beside = stage.activations(False), stage.activations(True)
        yield Text(
            f"activations of the update: {_gib(without)} GiB without gradient_checkpointing, "
            + ("which the architecture does not offer" if beside is None else f"{_gib(beside)} GiB with it")
        )
    for name, shape in stage.simulation.losses.items():
        full = shape.full_logits_bytes(gradient=name not in ("scoring", "evaluation"))
        yield Text(
            f"loss `{name}`: {shape.rows:,} rows in chunks of {shape.chunk:,}, logits {_gib(shape.logits_bytes)} GiB; "
            f"full logits would take {_gib(full)} GiB"
        )
    yield from _time(stage.speed)
    for flops in _without_steps(stage):
        yield Text(f"FLOPs of the models for each token that they read: {flops / 1e9:,.3g} G")
    smallest = stage.smallest_world_size(gpu)
    yield Text(f"smallest world size that fits: {smallest or 'none with these keys'}")
    if stage.student_side != "student":
        on_host = stage.student_side == "teacher" and HOST in stage.simulation.places
        where = "is the host's" if on_host else "stands in the student's rows"
        yield Text(f"the {stage.student_side} model's memory {where}")
    for name, (kind, place) in stage.elsewhere.items():
        words = f"{kind} {'in' if kind == 'cached' else 'by'} {place}"
        loaded = ", of them the head alone" if stage.simulation.teachers[name].parameters else ""
        yield Text(f"the {name} is {words}: its weights are not loaded{loaded}")
    if stage.cache is not None:
        yield Text(_cache(stage.cache))
    if stage.simulation.shown is not None:
        yield Text(f"pictures: {stage.simulation.shown}")
    for what in stage.not_counted:
        yield Text(f"not counted: {what}")


def _cache(cache: CacheSize) -> str:
    a_row = f"{cache.bytes_per_row:,} bytes a token"
    if cache.total is None:
        return f"cache: {a_row}; how many there are is not known before the run, whose data or tokenizer is not here"
    most = "at most " if cache.at_most else ""
    size = f"{_gib(cache.total)} GiB" if cache.total >= GIB else f"{cache.total / 2**20:,.2f} MiB"
    return f"cache: {most}{size} on disk ({most}{cache.rows:,} rows of {cache.texts:,} texts, {a_row})"


def _without_steps(stage: StagePlan) -> Iterator[float]:
    """The FLOPs for each token of the texts that a stage without steps reads."""
    if not stage.work.terms:
        yield from (flops_per_token(stage.simulation, one) for one in stage.work.scorings)


def _time(speed: Speed | None) -> Iterator[Text]:
    if speed is None:
        yield Text("time: not estimated, because the stage takes no step")
        return
    yield Text(
        f"FLOPs of a step and rank: {speed.flops / 1e12:,.1f} T (rollout {speed.rollout_flops / 1e12:,.1f}, "
        f"scoring {speed.scoring_flops / 1e12:,.1f}, update {speed.update_flops / 1e12:,.1f})"
    )
    if speed.seconds is None:
        yield Text("time: not estimated on this device, or on this host, whose speed is not known")
    else:
        each = ", ".join(f"{name} {value:.2f}" for name, value in speed.seconds.items() if value)
        yield Text(f"estimated time of a step: {sum(speed.seconds.values()):.2f} s ({each})")


def _verdict(run: PlannedRun) -> Text:
    of = f"of {run.gpu.memory_gib:,.0f} GiB"
    text = f"peak {_gib(run.peaks[HOME])} GiB {of}"
    if len(run.peaks) > 1:
        named = {place or "the student's device": size for place, size in run.peaks.items()}
        parts = [f"{_gib(size)} GiB {of} on {place}" for place, size in named.items()]
        text = f"peak {', '.join(parts)}"
    if run.fits:
        return Text(f"fits: {text}", style="green")
    return Text(f"does not fit: {text}. In this order, until it does:", style="red")


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
