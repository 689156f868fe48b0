"""`minillm bench save`: steps with checkpoints that a thread writes meanwhile, beside steps that wait for them.

The same run of one stage is made both ways in processes of its own, in a random order, and its records say the rest: the
seconds of the steps after the first, and those that the loop spent on saving between them, for copies, writing, and waiting
for the checkpoint before. A checkpoint that is still being written slows the steps beside it, and that is in their seconds.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from minillm import UserError
from minillm.benchmarks.machine import describe, show_page
from minillm.cli.arguments import split
from minillm.config.loader.run_plan import load_run

WAYS = {False: "the run waits", True: "in the background"}


@dataclass(frozen=True)
class Measured:
    """One run: its steps after the first, and what was saved between them."""

    step_seconds: float  # of a step, without saving
    saving_seconds: float  # of a checkpoint, as far as the loop waits for it
    batches: float  # the part of a step in which no weight is updated and nothing sampled
    steps_per_s: float  # with saving


def main(argv: list[str] | None = None) -> int:
    """Measures and prints a table; writes it with --output. Returns the exit status.

    Raises UserError for a configuration of several stages, and where a run fails.
    """
    arguments = _parser().parse_args(argv)
    if arguments.steps <= arguments.every:
        raise UserError(
            f"--steps {arguments.steps}: more than --every {arguments.every}, so that a checkpoint is written"
        )
    machine = describe("cpu", threads=arguments.threads)
    order, found = random.Random(arguments.seed), {way: [] for way in WAYS}
    for repeat in range(arguments.repeats):
        for way in order.sample(sorted(WAYS), len(WAYS)):
            print(f"repeat {repeat + 1}/{arguments.repeats}: {WAYS[way]}", file=sys.stderr)
            measured, size = _run(arguments, way)
            found[way].append(measured)
    settings = {
        "checkpoint": f"{size / 2**20:,.0f} MiB, after every {arguments.every} steps",
        "repeats": f"{arguments.repeats} runs of {arguments.steps} steps each way",
    }
    show_page(_table(found), arguments.output, {**machine, **settings})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm bench save", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "words", nargs="+", metavar="FILE|KEY=VALUE", help="a configuration of one stage, as for `minillm train`"
    )
    parser.add_argument("--steps", type=int, default=10, help="of a run (default: %(default)s)")
    parser.add_argument("--every", type=int, default=2, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="runs each way (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    parser.add_argument("--folder", metavar="DIR", help="on the disk to write to (default: that of temporary files)")
    parser.add_argument("--output", metavar="MD", help="write the table")
    return parser


def _run(arguments: argparse.Namespace, in_background: bool) -> tuple[Measured, int]:
    """One run, and the bytes of its last checkpoint."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        output_dir = Path(folder) / "run"
        keys = _keys(arguments, output_dir, in_background)
        command = [sys.executable, "-W", "ignore", "-m", "minillm", "train", *arguments.words, *keys]
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the run ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
        lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [record for record in map(json.loads, lines) if record["kind"] == "train"]
        checkpoint = output_dir / f"checkpoint-{arguments.steps}"
        return measure(steps, arguments.every), sum(
            one.stat().st_size for one in checkpoint.rglob("*") if one.is_file()
        )


def _keys(arguments: argparse.Namespace, output_dir: Path, in_background: bool) -> list[str]:
    plan = load_run(*split(arguments.words))
    if len(plan.stages) != 1:
        names = [stage.name for stage in plan.stages]
        raise UserError(
            f"the configuration has the stages {', '.join(names)}; leave one: stages.{names[-1]}=null takes it out"
        )
    prefix = f"stages.{plan.stages[0].name}." if plan.document.get("stages") else ""
    keys = {
        "train.max_steps": arguments.steps,
        "train.num_train_epochs": "null",
        "train.max_seconds": "null",
        **({"eval.sets": "null"} if plan.stages[0].config.eval.sets else {}),
        "log.steps": 1,
        "save.steps": arguments.every,
        "save.in_background": str(in_background).lower(),
    }
    return [f"output_dir={output_dir}", *(f"{prefix}{key}={value}" for key, value in keys.items())]


def measure(records: list[dict], every: int) -> Measured:
    """The measure of a run from the records of its steps, where `every` steps a checkpoint was written."""
    first, last = records[0], records[-1]
    seconds = last["seconds"] - first["seconds"]
    saving = sum(record.get("time/saving_s", 0.0) for record in records[1:])
    batches = sum(record.get("time/scoring_s", 0.0) for record in records[1:])
    steps, checkpoints = len(records) - 1, (len(records) - 1) // every
    return Measured(seconds / steps, saving / checkpoints, batches / seconds, steps / (seconds + saving))


def _table(found: dict[bool, list[Measured]]) -> list[str]:
    lines = [
        "| checkpoints | s a step | s a checkpoint | batches, % of a step | steps/s over waiting |",
        "|---|--:|--:|--:|--:|",
    ]
    for way, name in WAYS.items():
        runs = found[way]
        step, saving, batches = (
            statistics.median(getattr(run, field) for run in runs)
            for field in ("step_seconds", "saving_seconds", "batches")
        )
        pairs = zip(runs, found[False], strict=True)
        ratio = statistics.median(one.steps_per_s / other.steps_per_s for one, other in pairs)
        lines.append(f"| {name} | {step:.2f} | {saving:.2f} | {100 * batches:.2f} | {ratio:.2f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
