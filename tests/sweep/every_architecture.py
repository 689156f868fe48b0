"""make sweep: every decoder architecture of transformers, tiny, through all that is done with a model.

    python -m tests.sweep.every_architecture --only llama,mamba2

Each is built from its default configuration with small sizes, in a process of its own. A step holds, is refused in a
sentence, or fails: with a traceback, a crash, or numbers that are not the model's. The table is written after each
architecture. The exit status is 1 where a step failed.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections import Counter
from importlib import import_module
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.forked import wait
from tests.mutants.survivors import markdown
from tests.sweep.journey import FAILED, HELD, REFUSED, SKIPPED, STEPS, Journey, Outcome
from tests.sweep.tiny_models import ARCHITECTURES

ROOT = Path(__file__).parents[2]
# what commands import when they run: once, for all processes to come
IMPORTED = (
    "cli.eval",
    "cli.generate",
    "cli.plan",
    "cli.train",
    "engine.torch",
    "planning.planner",
    "reporting.curves",
    "train.run",
)
MARKS = {HELD: "held", REFUSED: "refused", FAILED: "FAILED", SKIPPED: "-"}


def in_process(model_type: str, seconds: float) -> dict[str, Outcome]:
    """An architecture's outcomes, from a process that may crash or hang: the step it was at has failed then."""
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder:
        told = Path(folder) / "told.jsonl"
        child = os.fork()
        if not child:
            try:
                os.setsid()
                torch.set_num_threads(1)
                silent = os.open(os.devnull, os.O_RDWR)
                for stream in range(3):
                    os.dup2(silent, stream)
                with told.open("a") as file:

                    def report(step: str, outcome: Outcome) -> None:
                        print(json.dumps([step, *outcome]), file=file, flush=True)

                    Journey(model_type, Path(folder)).outcomes(report)
            finally:
                os._exit(0)
        end = _ended(wait(child, seconds), seconds)
        lines = told.read_text().splitlines() if told.exists() else []
    found = {step: Outcome(*rest) for step, *rest in map(json.loads, lines)}
    if len(found) < len(STEPS):
        found[STEPS[len(found)]] = Outcome(FAILED, end)
    return {step: found.get(step, Outcome(SKIPPED)) for step in STEPS}


def _ended(status: int | None, seconds: float) -> str:
    if status is None:
        return f"not done after {seconds:g} seconds"
    return f"the process was ended by {signal.Signals(-status).name}" if status < 0 else "the process ended"


def report_text(found: dict[str, dict[str, Outcome]]) -> str:
    """The table of outcomes, the numbers of each, and what was said."""
    counts = [(step, *(Counter(one[step].result for one in found.values())[mark] for mark in MARKS)) for step in STEPS]
    marks = [(name, *(MARKS[outcomes[step].result] for step in STEPS)) for name, outcomes in found.items()]
    said = [
        (name, step, outcome.result, outcome.said)
        for name, outcomes in found.items()
        for step, outcome in outcomes.items()
        if outcome.said
    ]
    parts = (
        f"# Sweep: {len(found)} architectures",
        markdown(("step", *MARKS.values()), counts),
        markdown(("architecture", *STEPS), marks),
        markdown(("architecture", "step", "", "said"), sorted(said, key=lambda row: row[2])),
    )
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="architectures by their model_type, with commas between")
    parser.add_argument(
        "--seconds", type=float, default=600, help="of an architecture at most; a quiet machine needs a few"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "sweep.md", help="the table of outcomes")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",") if arguments.only else ARCHITECTURES
    unknown = sorted(set(chosen) - set(ARCHITECTURES))
    if unknown:
        parser.error(f"transformers has no decoder called {', '.join(unknown)}")
    for module in IMPORTED:
        import_module(f"minillm.{module}")
    console, found = Console(), {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # a thread that draws must not live while a process is forked
    with Progress(*columns, console=console, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(chosen))
        for name in chosen:
            progress.update(task, description=name, refresh=True)
            found[name] = in_process(name, arguments.seconds)
            for step, outcome in found[name].items():
                if outcome.result == FAILED and step != "build":
                    console.print(f"{name}, {step}: {outcome.said}", markup=False, highlight=False)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(report_text(found))
            progress.update(task, advance=1, refresh=True)
    table = Table("step", *MARKS.values())
    for step in STEPS:
        counts = Counter(outcomes[step].result for outcomes in found.values())
        table.add_row(step, *(str(counts[mark]) for mark in MARKS))
    console.print(table)
    console.print(f"what was said: {arguments.out}")
    # what does not build tiny is not swept
    failed = any(
        one.result == FAILED for outcomes in found.values() for step, one in outcomes.items() if step != "build"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
