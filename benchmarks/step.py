"""`minillm bench step`: a whole MiniLLM update beside the MiniLLMTrainer of TRL 1.14.2, on a CPU.

An update is one generation of answers, its scoring by the teacher and the optimiser steps on it. All trainers load the
same folders (random Llama models, one tokenizer; or with --teacher a real one and a student of some of its layers) and
answer the same prompts with as many tokens at temperature 1, without a pre-training loss. Every trainer runs in a process
of its own, in a new random order in every repeat. With --beside a trainer is the minillm of another checkout, which reads
of a case what it knows: an older one mixes without coins. `passes` are the models' passes of such an update alone: what is
left to gain for a trainer that runs them as transformers does.
"""

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from minillm import UserError
from minillm.benchmarks.machine import as_table, describe
from minillm.benchmarks.step_inputs import write_random, write_real
from minillm.benchmarks.step_providers import PROVIDERS, versions

WARMUP_UPDATES = 1
BESIDE = "minillm --beside"
# every trainer, an older one too, reads its clock by this name
CPU_SECONDS = "import runpy, time; time.perf_counter = time.process_time; runpy.run_module({!r}, run_name='__main__')"
COLUMNS = (
    *(
        "student",
        "teacher",
        "vocab",
        "inner_epochs",
        "alpha",
        "shared_coins",
        "trainer",
        "tokens_per_s",
        "p20_s",
        "median_s",
        "p80_s",
    ),
    *("peak_mib", "ratio"),
)


@dataclass(frozen=True)
class Case:
    """One comparison: hidden size and layers of both models, and how often a generation is used."""

    student: tuple[int, int] | str  # a name for one that is cut from --teacher
    teacher: tuple[int, int] | str
    inner_epochs: int
    alpha: float = 0.0  # of minillm alone: TRL samples from the student
    shared_coins: bool = False

    @property
    def models(self) -> tuple[str, str]:
        """Both models in words."""
        return tuple(one if isinstance(one, str) else "{}x{}".format(*one) for one in (self.student, self.teacher))

    @property
    def name(self) -> str:
        sizes = "{} from {}".format(*self.models)
        mixed = f", alpha {self.alpha}" if self.alpha else ""
        mixed += ", shared coins" if self.shared_coins else ""
        return f"{sizes}, {self.inner_epochs} inner epoch{'s' if self.inner_epochs > 1 else ''}{mixed}"


CASES = [
    Case((256, 4), (512, 8), 1),
    Case((256, 4), (512, 8), 4),
    Case((256, 4), (512, 8), 1, alpha=0.2),
    Case((256, 4), (512, 8), 1, alpha=0.2, shared_coins=True),
    Case((128, 2), (256, 4), 1),
]


@dataclass(frozen=True)
class Row:
    """One trainer on one case; the ratio is ours over TRL's tokens a second."""

    case: Case
    trainer: str
    seconds: list[float]  # of updates after the first
    peak_bytes: int
    answer_tokens: int  # of an update: inner epochs count once each

    @property
    def tokens_per_s(self) -> float:
        return self.answer_tokens / statistics.median(self.seconds)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a table, writes it with --output. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    try:
        known = CASES if arguments.teacher is None else _real_cases(arguments)
    except UserError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    cases = [case for case in known if arguments.match is None or arguments.match in case.name]
    if not cases:
        print(f"no case matches {arguments.match!r}: {'; '.join(case.name for case in known)}", file=sys.stderr)
        return 2
    machine = describe("cpu", threads=arguments.threads) | versions()
    rows, skipped = [], {}
    for case in cases:
        with tempfile.TemporaryDirectory(prefix="minillm-bench-") as folder:
            if arguments.teacher is None:
                write_random(case.student, case.teacher, arguments, Path(folder))
            else:
                write_real(arguments.teacher, arguments.layers, arguments.texts, arguments, Path(folder))
            found, why = _measure(case, arguments, Path(folder))
        rows += found
        skipped |= why
    page = _markdown(rows, skipped, machine, arguments)
    print(page)
    if arguments.output:
        folder = Path(arguments.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step.md").write_text(page, encoding="utf-8")
        with (folder / "step.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *(_cells(row, rows, arguments) for row in rows)])
        print(f"written to {folder}")
    return 0 if rows else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm bench step", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--match", help="only cases whose name contains this")
    parser.add_argument("--trainers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--teacher", help="a model's folder or GGUF file, in the place of random models")
    parser.add_argument("--layers", nargs="+", type=int, help="of the teacher, which the student is made of")
    parser.add_argument("--texts", help="a file of JSON lines to take prompts from, with --teacher")
    parser.add_argument("--beside", help="the root of another checkout, whose minillm is a trainer of its own")
    parser.add_argument("--vocab", type=int, default=32_000, help="default: %(default)s")
    parser.add_argument("--answers", type=int, default=16, help="of a generation (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=4, help="of a process, the first untimed (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=2, help="processes of a trainer (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="of each process on the CPU, beside other work; goes with --threads 1",
    )
    parser.add_argument("--timeout", type=int, default=1800, help="seconds a process may take (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and order (default: %(default)s)")
    parser.add_argument("--output", help="folder for step.md and step.csv (default: print only)")
    return parser


def _real_cases(arguments: argparse.Namespace) -> list[Case]:
    """Raises UserError where --teacher comes without the student's layers, the texts."""
    for flag, given in (("--layers", arguments.layers), ("--texts", arguments.texts)):
        if not given:
            raise UserError(
                f"--teacher needs {flag}: the student is a part of the teacher, and the prompts are real texts"
            )
    teacher = Path(arguments.teacher).stem
    pair = f"{len(arguments.layers)} layers", teacher
    return [Case(*pair, 1), Case(*pair, 1, alpha=0.2), Case(*pair, 1, alpha=0.2, shared_coins=True)]


def _measure(case: Case, arguments: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, str]]:
    job = {**vars(arguments), **asdict(case), "folder": str(folder)}
    trainers = [name for name in arguments.trainers if name == "minillm" or not case.alpha]
    if arguments.beside:  # an older one without shared coins draws its mixture as it can
        trainers.append(BESIDE)
    order = random.Random(arguments.seed)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    peaks, skipped = dict.fromkeys(trainers, 0), {}
    for repeat in range(arguments.repeats):
        order.shuffle(trainers)
        for name in trainers:
            if name in skipped:
                continue
            print(f"{case.name}, repeat {repeat + 1}/{arguments.repeats}: {name}", file=sys.stderr)
            result = _process({**job, "provider": "minillm" if name == BESIDE else name}, arguments, name)
            if "skipped" in result:
                skipped[name] = result["skipped"]
                continue
            seconds[name] += result["seconds"][WARMUP_UPDATES:]
            peaks[name] = max(peaks[name], result["peak_bytes"])
    tokens = arguments.answers * arguments.tokens * case.inner_epochs
    rows = [Row(case, name, seconds[name], peaks[name], tokens) for name in sorted(seconds) if seconds[name]]
    return rows, skipped


def _process(job: dict, arguments: argparse.Namespace, trainer: str) -> dict:
    path = Path(job["folder"]) / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    module = "minillm.benchmarks.step_providers"
    how = ["-c", CPU_SECONDS.format(module)] if arguments.cpu_seconds else ["-m", module]
    command = [sys.executable, "-W", "ignore", *how, str(path)]
    root = Path(arguments.beside).resolve() if trainer == BESIDE else Path(__file__).parents[2]
    paths = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "PYTHONPATH": paths}
    try:
        done = subprocess.run(
            command, env=environment, cwd=root, capture_output=True, text=True, timeout=arguments.timeout
        )
    except subprocess.TimeoutExpired:
        return {"skipped": f"took longer than {arguments.timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith(('{"seconds"', '{"skipped"'))]
    if done.returncode or not lines:
        complaint = done.stderr.strip().rpartition("\n")[2][:300]
        return {"skipped": f"the process ended with status {done.returncode}: {complaint}"}
    return json.loads(lines[-1])


def _ratio(row: Row, rows: list[Row]) -> str:
    """Against TRL on the same models and inner epochs, whose rollouts know no mixture."""
    same = [
        other for other in rows if other.trainer == "trl" and _without_alpha(other.case) == _without_alpha(row.case)
    ]
    return f"{row.tokens_per_s / same[0].tokens_per_s:.2f}" if same else ""


def _without_alpha(case: Case) -> tuple:
    return case.student, case.teacher, case.inner_epochs


def _cells(row: Row, rows: list[Row], arguments: argparse.Namespace) -> list[str]:
    low, high = (statistics.quantiles(row.seconds, n=5)[i] if len(row.seconds) > 1 else row.seconds[0] for i in (0, 3))
    return [
        *row.case.models,
        *map(str, (arguments.vocab if arguments.teacher is None else "", row.case.inner_epochs, row.case.alpha)),
        "yes" if row.case.shared_coins else "no",
        row.trainer,
        f"{row.tokens_per_s:.0f}",
        *(f"{value:.3f}" for value in (low, statistics.median(row.seconds), high)),
        f"{row.peak_bytes / 2**20:.0f}",
        _ratio(row, rows),
    ]


def _markdown(rows: list[Row], skipped: dict[str, str], machine: dict[str, str], arguments: argparse.Namespace) -> str:
    settings = {
        "seconds": "of the process on the CPU" if arguments.cpu_seconds else "of the clock",
        "work": f"{arguments.answers} answers of {arguments.tokens} tokens to prompts of {arguments.prompt_tokens}, fp32",
        "repeats": f"{arguments.repeats} processes of {arguments.updates} updates, the first not counted",
    }
    names = (
        "student",
        "teacher",
        "vocabulary",
        "inner epochs",
        "alpha",
        "shared coins",
        "trainer",
        "tokens/s",
        "p20 s",
        "median s",
    )
    lines = [
        "# A MiniLLM update",
        "",
        "| " + " | ".join((*names, "p80 s", "peak MiB", "x TRL")) + " |",
        "|---|---|--:|--:|--:|---|---|--:|--:|--:|--:|--:|--:|",
        *("| " + " | ".join(_cells(row, rows, arguments)) + " |" for row in rows),
        "",
        "Tokens: those of answers that receive a gradient, once for each inner epoch. Seconds are of a whole update. "
        "Peak memory is the growth of the resident set over what was imported: models, optimiser and all buffers.",
        *(f"\n{name}: {reason}" for name, reason in skipped.items()),
        "",
        *as_table({**machine, **settings}),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
