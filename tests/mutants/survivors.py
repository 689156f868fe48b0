"""make mutants: break one line at a time and list the changes that no test notices.

    python -m tests.mutants.survivors --rooms methods,engine --sample 200 --seed 0

A room's tests are run once to see which lines each of them reaches. A mutant then runs the tests that reach its lines,
the namesake's first, and is killed by the first failure, or by its time. It lives in a copy of the tree, in a fork of a
process that has imported the libraries, so that most mutants take a second. Lines that are run in other processes
alone (ranks of a group, the command line) are not measured: their mutants are counted as not reached.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.forked import wait
from tests.mutants.mutations import Mutant, mutants_of
from tests.mutants.reached_lines import ChoicePlugin, Reached, ReachPlugin

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Room:
    """A folder of source, and the tests that are asked."""

    source: str
    tests: tuple[str, ...]
    without: tuple[str, ...] = ()  # file names that are not broken: patterns
    options: tuple[str, ...] = ()  # of pytest: tests that are left out


def _files(folder: str, names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/test_{name}.py" for name in names.split())


ROOMS = {
    # without Triton's kernels and the tests of every backend on hostile inputs: hours, where a formula takes a second
    "kernels": Room(
        "kernels",
        _files(
            "tests/kernels",
            "arguments chunks coupled divergences head linear_losses objective reference rows token_stats tiles",
        ),
        ("*_triton.py",),
        ("-k", "not triton and not tiled"),
    ),
    "methods": Room("minillm/methods", ("tests/methods", "tests/engine/test_torch.py")),
    "rollout": Room("minillm/rollout", ("tests/rollout", "tests/methods")),
    # that of several ranks is run by processes of a group alone
    "engine": Room("minillm/engine", ("tests/engine", "tests/methods"), ("deepspeed.py",)),
    "evaluate": Room("minillm/evaluate", ("tests/evaluate",)),
    # without the runs that are damaged or killed and resumed, which take minutes
    "train": Room(
        "minillm/train",
        _files(
            "tests/train",
            "best_model frozen_weights model_cache prepared progress run stage trainer trainer_state",
        ),
    ),
}
OUTCOMES = ("killed", "too slow", "survived", "not reached")
PYTEST = ("-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=no")


def in_fork(work: Callable[[], int], seconds: float) -> int | None:
    """The exit status of `work` in a process of its own, whose output is dropped; None where it takes longer."""
    child = os.fork()
    if not child:
        status = 70
        try:
            os.setsid()
            silent = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(silent, stream)
            status = int(work())
        finally:
            os._exit(status)
    return wait(child, seconds)


class Run:
    """One run over rooms, in a copy of the tree."""

    def __init__(self, copy: Path, seconds: float):
        """Args: seconds: of tests that a mutant is asked, as they took without it; one test always."""
        self.copy, self.seconds = copy, seconds

    def pytest(self, tests: Iterable[str], plugin: object, *options: str) -> int:
        import pytest

        os.chdir(self.copy)
        sys.path[:] = [str(self.copy), *(path for path in sys.path if path not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
            del sys.modules[name]  # those of this run; its own lie in the copy
        return pytest.main([*PYTEST, f"--basetemp={self.copy}/.tmp", *options, *tests], plugins=[plugin])

    def measure(self, room: Room) -> Reached:
        """Run the room's tests once. The libraries that they import are imported here, for all forks to come."""
        path = self.copy / "reached.json"
        path.unlink(missing_ok=True)
        plugin = ReachPlugin([self.copy / room.source], path)

        def work() -> int:
            plugin.start()
            return self.pytest(room.tests, plugin, "--maxfail=1000", *room.options)

        status = in_fork(work, seconds=3600)
        if status not in (0, 1):
            sys.exit(f"{' '.join(room.tests)} cannot be run: pytest ends with {status}")
        found = json.loads(path.read_text())
        if status:
            print(f"some tests fail with nothing broken, and are not asked: {' '.join(found['failed'])}")
        for name in found["modules"]:
            with suppress(Exception):
                import_module(name)
        root = f"{self.copy.resolve()}{os.sep}"
        contexts = {
            file.removeprefix(root): {int(line): tests for line, tests in lines.items()}
            for file, lines in found["contexts"].items()
        }
        return Reached(contexts, found["seconds"])

    def outcome(self, file: str, mutant: Mutant, reached: Reached) -> str:
        """One of OUTCOMES."""
        tests = reached.tests_of(file, range(mutant.line, mutant.last_line + 1))
        if not tests:
            return "not reached"
        spent = list(accumulate(reached.seconds[test] for test in tests))
        tests = tests[: max(1, sum(so_far <= self.seconds for so_far in spent))]
        path = self.copy / file
        whole = path.read_bytes()
        path.write_bytes(mutant.applied_to(whole))
        try:
            files = dict.fromkeys(test.partition("::")[0] for test in tests)
            limit = 20 + 3 * sum(reached.seconds[test] for test in tests)
            status = in_fork(lambda: self.pytest(files, ChoicePlugin(tests)), limit)
        finally:
            path.write_bytes(whole)
        return {None: "too slow", 0: "survived"}.get(status, "killed")


def sources(tree: Path, room: Room) -> list[Path]:
    """The files of a room that are broken."""
    return sorted(path for path in (tree / room.source).rglob("*.py") if not any(map(path.match, room.without)))


def candidates(tree: Path, room: Room) -> list[tuple[str, Mutant]]:
    """(file, mutant) of all mutants of a room."""
    files = sources(tree, room)
    return [(str(path.relative_to(tree)), mutant) for path in files for mutant in mutants_of(path.read_bytes())]


def share(counts: Counter) -> str:
    """The percentage of the reached mutants that were killed."""
    reached = counts.total() - counts["not reached"]
    return f"{(counts['killed'] + counts['too slow']) / reached:.0%}" if reached else "-"


class Report:
    """The file with the shares and the survivors, written anew with every mutant: a run may be ended at any time."""

    header = ("room", *OUTCOMES, "killed of those reached")

    def __init__(self, arguments: argparse.Namespace):
        self.arguments = arguments
        self.counts: dict[str, Counter] = defaultdict(Counter)
        self.alive: list[tuple[object, ...]] = []

    def add(self, room: str, file: str, mutant: Mutant, outcome: str) -> None:
        self.counts[room][outcome] += 1
        if outcome in ("survived", "not reached"):
            self.alive.append((file, mutant.line, outcome, *mutant.difference()))
        sample = f"a sample of {self.arguments.sample} mutants a room" if self.arguments.sample else "all mutants"
        parts = (
            f"# Mutants: {sample}, seed {self.arguments.seed}",
            markdown(self.header, self.rows()),
            markdown(("file", "line", "", "before", "after"), self.alive),
        )
        self.arguments.out.parent.mkdir(parents=True, exist_ok=True)
        self.arguments.out.write_text("\n\n".join(parts) + "\n")

    def rows(self) -> list[tuple[object, ...]]:
        return [(room, *(counts[one] for one in OUTCOMES), share(counts)) for room, counts in self.counts.items()]

    def table(self) -> Table:
        shown = Table(*self.header)
        for row in self.rows():
            shown.add_row(*map(str, row))
        return shown


def markdown(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A table in Markdown."""
    header = tuple(header)
    lines = [header, ("---",) * len(header), *rows]
    cells = ([" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", default=",".join(ROOMS), help="rooms by name, with commas between")
    parser.add_argument("--sample", type=int, default=100, help="mutants of a room, drawn at random; 0 takes all")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--seconds", type=float, default=30, help="of tests a mutant, those of its namesake first")
    parser.add_argument("--files", default="", help="only files whose path holds this text")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants.md", help="the table of survivors")
    arguments = parser.parse_args()
    unknown = set(arguments.rooms.split(",")) - ROOMS.keys()
    if unknown:
        parser.error(f"no rooms {sorted(unknown)}; there are {', '.join(ROOMS)}")
    console, report = Console(), Report(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the copy is deleted
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".pytest_cache", ".hypothesis")
        shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
        os.environ.update(PYTHONPATH=str(copy), OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
        os.environ.setdefault("TRITON_INTERPRET", "1")
        # a file that changes twice in a second would be taken from its bytecode
        sys.dont_write_bytecode = True
        run = Run(copy, arguments.seconds)
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        # a thread that draws must not live while a process is forked
        with Progress(*columns, console=console, auto_refresh=False) as progress:
            for name in arguments.rooms.split(","):
                room = ROOMS[name]
                console.print(f"{name}: running {' '.join(room.tests)} once")
                reached = run.measure(room)
                found = [one for one in candidates(copy, room) if arguments.files in one[0]]
                size = min(arguments.sample or len(found), len(found))
                chosen = sorted(random.Random(arguments.seed).sample(range(len(found)), size))
                task = progress.add_task(name, total=size)
                for file, mutant in (found[place] for place in chosen):
                    report.add(name, file, mutant, run.outcome(file, mutant, reached))
                    done = f"{name}: {share(report.counts[name])} killed"
                    progress.update(task, description=done, advance=1, refresh=True)
    console.print(report.table())
    console.print(f"survivors: {arguments.out}")


if __name__ == "__main__":
    main()
