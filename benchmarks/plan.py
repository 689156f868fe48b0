"""`minillm bench plan`: the peak memory that `minillm plan` predicts beside the one that training steps take on a CPU.

A case is random models and prompts at their longest. Each runs in a process of its own, or in one process per rank.
Imports and a tiny run of the same kind come first, so that what is loaded late is loaded. The resident memory before the
models are made is then the zero, and the kernel's high-water mark of every phase is the measurement: of ranks, the
largest. The allocator returns freed memory at once.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from minillm.benchmarks.machine import as_table, describe
from minillm.benchmarks.plan_cases import CASES, STEPS, Case, load, student_keys
from minillm.benchmarks.plan_pictures import SIGHTS, shown
from minillm.distributed import collectives, group
from minillm.distributed.launcher import end

ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
MIB = 2**20
MEASURED = "measured "


def predict(case: Case) -> dict[str, int]:
    """Return the bytes at the peak of each phase, as `minillm plan` predicts them."""
    from minillm.planning.planner import plan_run

    with tempfile.TemporaryDirectory() as folder:
        run = load(case, Path(folder))
        if case.side and SIGHTS[case.family].processor is not None:
            SIGHTS[case.family].processor(case.side).save_pretrained(Path(folder) / "student")
        (stage,) = plan_run(run, gpu="cpu", world_size=max(1, case.ranks)).stages
    return {memory.phase: memory.device_bytes for memory in stage.memory}


def measure(case: Case) -> dict[str, int]:
    """Return the bytes of resident memory over those before the models were made, at the peak of each phase, of this
    process, which is one of `case.ranks`."""
    with tempfile.TemporaryDirectory() as folder:
        if case.ranks:
            group.join(Path(folder))
        _take_steps(
            replace(
                case,
                hidden=128,
                layers=1,
                teacher_layers=case.teacher_layers and 1,
                second_layers=case.second_layers and 1,
                vocab=512,
                batch=2,
            )
        )
        gc.collect()
        zero = _resident()["VmRSS"]
        peaks = {phase: peak - zero for phase, peak in _take_steps(case).items()}
        group.leave()
    return peaks


def _take_steps(case: Case) -> dict[str, int]:
    """Train as the trainer does; returns the high-water mark of each phase."""
    from minillm.data.instructions import PromptSet
    from minillm.engine import build_engine
    from minillm.evaluate.evaluator import Evaluator
    from minillm.methods import build_method
    from minillm.methods.protocol import TrainingData
    from minillm.models.families import answer_beside_pictures
    from minillm.rollout.local.local_rollouts import LocalRollouts
    from minillm.rollout.rank_items import rank_items
    from minillm.teachers.preflight import preflight
    from minillm.teachers.several import weights_here

    peaks = {"collect": 0, "terms": 0, "update": 0, "evaluation": 0}
    with tempfile.TemporaryDirectory() as name:
        config = load(case, Path(name)).stages[0].config
        student, judge, tokenizer = _models(config, case, Path(name))
        by_layers = config.engine.type == "deepspeed" and config.engine.gather == "layers"
        theirs = {name: tokenizer for name in config.teachers} or tokenizer
        models, _ = preflight(student, judge, tokenizer, theirs, student.device, by_layers=by_layers)
        for one in (student, *weights_here(judge)):
            if case.side:
                answer_beside_pictures(one, True)
        rollouts = LocalRollouts(models, shared_coins=config.rollout.by_coins)
        del student, judge, one
        method = build_method(config)
        modules = method.modules(models)
        engine = build_engine(config, models, total_steps=STEPS, modules=modules)
        data = TrainingData(*_streams(case), rollouts=rollouts, folder=Path(name))
        items: Sequence = []
        held_out = PromptSet(data.prompts.items[: 2 * case.evaluated], 0, "")
        evaluator = Evaluator({"held_out": held_out}, config.eval, seed=0) if case.evaluated else None
        for step in range(STEPS):
            with _phase(peaks, "collect"):
                if not method.needs.buffered or step != 1:  # a second buffer, beside the first
                    items = method.collect(data, models, step)
            size = case.batch
            with _phase(peaks, "terms"):
                taken = rank_items(items, range(method.step_size))
                terms = [
                    method.terms(taken[start : start + size], data, models) for start in range(0, len(taken), size)
                ]
            with _phase(peaks, "update"):
                engine.step(terms)
            if evaluator is not None:
                with _phase(peaks, "evaluation"):
                    evaluator.evaluate(models, rollouts)
        engine.close()
    return peaks


def _models(config, case: Case, folder: Path):
    """The student, its teacher or its two teachers, and the tokenizer of all."""
    import torch

    from minillm.config.models import StudentConfig
    from minillm.models.loading import load_student, load_teacher
    from minillm.models.tokenizers import load_tokenizer
    from minillm.teachers.local import LocalTeacher
    from minillm.teachers.several import SeveralTeachers

    cpu, hollow = torch.device("cpu"), collectives.rank() > 0

    def random(layers: int) -> LocalTeacher:
        keys = StudentConfig(**student_keys(case, layers, folder / "judge"))
        model = load_student(keys, output_dir=folder, device=cpu, seed=1, hollow=hollow)
        return LocalTeacher(model.eval().requires_grad_(False))

    judge = None if case.teacher_layers is None else random(case.teacher_layers)
    if case.quantization is not None:
        judge.model.save_pretrained(folder / "teacher")
        judge = LocalTeacher(load_teacher(config.teacher, output_dir=folder, device=cpu))
    if case.second_layers is not None:
        several = config.teacher_side
        both = {"teacher": judge, "second": random(case.second_layers)}
        judge = SeveralTeachers(both, several.weights, several.abilities)
    student = load_student(config.student, output_dir=folder, device=cpu, seed=0, hollow=hollow)
    return student, judge, load_tokenizer(config.student, folder)


def _streams(case: Case):
    """Prompts, of which every second one is a little shorter so that batches are padded, and blocks of text."""
    from minillm.data.instructions import Example
    from minillm.data.stream import Stream

    tokens, extras = shown(case.family, case.side) if case.side else (0, {})
    places = [case.vocab - 1] * tokens
    names = ("teacher", "second") if case.divided else (None,)
    examples = [
        Example(
            index,
            [*places, *range(1, case.prompt - len(places) + 1 - 4 * (index % 2))],
            list(range(1, case.answer + 1)),
            "",
            (),
            extras,
            judge=names[index % len(names)],
        )
        for index in range(max(8 * case.batch, 2 * case.evaluated))
    ]
    blocks = [list(range(1, case.prompt + case.answer + 1)) for _ in range(4 * case.batch)]
    return Stream(examples, seed=0), Stream(blocks, seed=0)


class _phase:
    """A context that adds the high-water mark of what runs inside to `peaks`."""

    def __init__(self, peaks: dict[str, int], name: str):
        self.peaks, self.name = peaks, name

    def __enter__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the high-water mark

    def __exit__(self, *_) -> None:
        self.peaks[self.name] = max(self.peaks[self.name], _resident()["VmHWM"])


def _resident() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def compare(case: Case) -> tuple[int, int]:
    """Return (predicted, measured) bytes at the peak of all phases, measured in fresh processes."""
    command = [sys.executable, "-m", "minillm.benchmarks.plan", "--measure", json.dumps(asdict(case))]
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        group = {"WORLD_SIZE": str(case.ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        free.close()
        logs = [Path(folder) / f"{rank}.log" for rank in range(max(1, case.ranks))]  # a full pipe would stop a rank
        processes = []
        for rank, log in enumerate(logs):
            place = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} if case.ranks else {}
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(command, env={**os.environ, **ALLOCATOR, **place}, stdout=file, stderr=file)
                )
        for process, log in zip(processes, logs, strict=True):
            if process.wait():
                raise RuntimeError(f"{case.name}: {log.read_text()[-2000:]}")
        measured = [_told(log) for log in logs]
    return max(predict(case).values()), max(measured)


def _told(log: Path) -> int:
    """The highest peak that a process printed, among whatever else it said."""
    (line,) = [line for line in log.read_text().splitlines() if line.startswith(MEASURED)]
    return max(json.loads(line.removeprefix(MEASURED)).values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="minillm bench plan", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name contains one of these")
    parser.add_argument("--output", type=Path, metavar="MD", help="write the table")
    parser.add_argument("--measure", metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(MEASURED + json.dumps(measure(Case(**json.loads(arguments.measure)))))
        end(0)
    cases = [case for case in CASES if not arguments.only or any(name in case.name for name in arguments.only)]
    if not cases:
        parser.error(f"no such case; there are {', '.join(case.name for case in CASES)}")
    rows = []
    for case in cases:
        predicted, measured = compare(case)
        rows.append((case, predicted, measured))
        print(f"{case.name}: predicted {predicted / MIB:.0f} MiB, measured {measured / MIB:.0f} MiB", flush=True)
        if arguments.output:  # after every case: a long run that is stopped leaves a table
            arguments.output.write_text(_markdown(rows), encoding="utf-8")
    return 0


def _markdown(rows: Sequence[tuple[Case, int, int]]) -> str:
    lines = [
        "# Peak memory: planned and measured",
        "",
        "| case | family, hidden x layers (teacher's layers), vocabulary | batch x accumulation, tokens | planned, MiB | "
        "measured, MiB | planned / measured |",
        "|---|---|---|--:|--:|--:|",
    ]
    for case, predicted, measured in rows:
        layers = [str(one) for one in (case.teacher_layers, case.second_layers) if one is not None]
        teacher = f" ({' and '.join(layers)})" if layers else ""
        lines.append(
            f"| {case.name} | {case.family}, {case.hidden} x {case.layers}{teacher}, {case.vocab:,} | "
            f"{case.batch} x {case.accumulation}, {case.prompt} + {case.answer} | {predicted / MIB:,.0f} | "
            f"{measured / MIB:,.0f} | {predicted / measured:.3f} |"
        )
    lines += [
        "",
        "Measured: the kernel's high-water mark of resident memory over that of the process after its imports and a tiny "
        "run of the same kind, in the worst phase of three optimiser steps; with ZeRO-3 (gloo, weights gathered layer by "
        "layer, one thread a rank) that of the largest rank. Made by `minillm bench plan --output FILE`.",
        "",
        *as_table(describe("cpu")),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
