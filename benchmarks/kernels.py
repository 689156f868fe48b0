"""`minillm bench kernels`: the fused losses beside plain torch and the peers that are installed.

Every provider runs in a process of its own, in a new random order in every repeat; samples of all repeats are pooled.
With --goals only what the goals of `goals` need runs, and the page says which were reached; with --like what the losses
cost at the shapes of a model of one's own.
Needs torch alone (and triton on a GPU); plots need matplotlib.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from minillm import UserError
from minillm.benchmarks import goals, user_shapes
from minillm.benchmarks.cases import LOSSES, Case, suite
from minillm.benchmarks.machine import describe
from minillm.benchmarks.measure import MODES
from minillm.benchmarks.providers import FULL_LOGITS, PROVIDERS, YARDSTICK
from minillm.benchmarks.tables import Row, summarise, write_csv, write_markdown, write_plots


def main(argv: list[str] | None = None) -> int:
    """Measures, writes results.csv, results.md and plots, prints the table. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    heads = user_shapes.heads_of(arguments.like, arguments.teacher) if arguments.like else None
    cases = _cases(arguments, device) if heads is None else _cases_like(arguments, heads)
    if not cases:
        print("no case matches; --list shows them all", file=sys.stderr)
        return 2
    if arguments.teacher and not arguments.like:
        raise UserError("--teacher is that of a model named by --like")
    if arguments.list:
        print("\n".join(case.name for case in cases))
        return 0
    if arguments.goals and device != "cuda":
        print("--goals: they are about a GPU, and torch sees none here", file=sys.stderr)
        return 2
    if heads is not None:
        providers = [user_shapes.FULL, user_shapes.CURRENT, *user_shapes.OURS[device]]
    else:
        known = [name for name in PROVIDERS if name != FULL_LOGITS]
        providers = arguments.providers or (goals.PROVIDERS if arguments.goals else known)
        providers = list(dict.fromkeys([*providers, YARDSTICK]))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe(device, threads=arguments.threads)
    settings = {
        "repeats": arguments.repeats,
        "runs per repeat": f"{arguments.rep_ms} ms" if device == "cuda" else arguments.runs,
        "seed": arguments.seed,
    }
    rows, skipped, verdicts = [], {}, ""
    if arguments.busy:
        settings["busy processes beside"] = arguments.busy
    with tempfile.TemporaryDirectory(prefix="minillm-bench-") as scratch, _busy(arguments.busy):
        for results in _run(arguments, device, cases, providers, Path(scratch)):
            rows, skipped = summarise(cases, results, YARDSTICK)
            write_csv(folder / "results.csv", rows, machine)
            so_far = settings | {"state": "still running"}
            if arguments.goals:
                verdicts = goals.as_markdown(goals.judge(rows, skipped))
            write_markdown(folder / "results.md", rows, skipped, machine, so_far, [], verdicts)
    plots = [] if heads is not None else write_plots(folder, rows)
    page = write_markdown(folder / "results.md", rows, skipped, machine, settings, plots, verdicts)
    if heads is not None:
        page = user_shapes.as_text(arguments.like, heads, device, rows, skipped)
        page += f"\nBeside other libraries:\n\n    {user_shapes.command(cases)}\n"
    print(page)
    print(f"written to {folder}")
    return 0 if any(isinstance(row, Row) and row.provider != YARDSTICK for row in rows) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm bench kernels", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--output", default="bench-kernels", help="folder of the results (default: %(default)s)")
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), help="default: all")
    parser.add_argument("--goals", action="store_true", help="only what the kernels' goals need, on a GPU")
    parser.add_argument("--match", help="only cases whose name contains this")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument(
        "--like",
        metavar="MODEL_OR_CONFIG",
        help="full logits, a loss on them, and ours at the shapes of this model: a folder, a config.json, a hub name, or "
        "a .yaml file of minillm; takes --tokens, --losses, --dtype, --ignored",
    )
    parser.add_argument("--teacher", metavar="MODEL", help="with --like: its teacher, by default of its own shapes")
    shapes = parser.add_argument_group("cases of your own, instead of the built-in ones")
    shapes.add_argument("--losses", nargs="+", choices=LOSSES)
    shapes.add_argument("--tokens", nargs="+", type=int)
    shapes.add_argument("--shape", nargs=3, type=int, metavar=("H_STUDENT", "H_TEACHER", "VOCABULARY"))
    shapes.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    shapes.add_argument("--ignored", nargs="+", type=float, help="shares of ignored tokens, 0 to 1")
    shapes.add_argument("--top-k", nargs="+", type=int, metavar="K", help="ids that the teacher is known by; 0: all")
    timing = parser.add_argument_group("timing")
    timing.add_argument("--repeats", type=int, default=3, help="processes per provider (default: %(default)s)")
    timing.add_argument("--runs", type=int, default=3, help="timed calls per process on a CPU (default: %(default)s)")
    timing.add_argument("--warmup-ms", type=int, default=200, help="on a GPU (default: %(default)s)")
    timing.add_argument("--rep-ms", type=int, default=1000, help="on a GPU (default: %(default)s)")
    timing.add_argument("--threads", type=int, help="CPU threads (default: torch's own)")
    timing.add_argument(
        "--busy", type=int, default=0, metavar="PROCESSES", help="that hold a core each meanwhile, as other work would"
    )
    timing.add_argument("--timeout", type=int, default=1800, help="seconds a process may take (default: %(default)s)")
    timing.add_argument("--seed", type=int, default=0, help="of the inputs and the order (default: %(default)s)")
    return parser


def _cases(arguments: argparse.Namespace, device: str) -> list[Case]:
    cases = list(goals.CASES) if arguments.goals else suite(device)
    own = arguments.losses, arguments.tokens, arguments.shape, arguments.dtype, arguments.ignored, arguments.top_k
    if any(own) and arguments.goals:
        raise SystemExit("--goals has cases of its own; leave the options for cases out")
    if any(own):
        first = cases[0]
        shape = arguments.shape or (first.student_hidden, first.teacher_hidden, first.vocab)
        cases = [
            Case(loss, tokens, *shape, arguments.dtype or first.dtype, ignored, top_k=top_k)
            for loss in arguments.losses or [first.loss]
            for tokens in arguments.tokens or [first.tokens]
            for ignored in arguments.ignored or [0.0]
            for top_k in arguments.top_k or [0]
            if not (top_k and loss == "cross_entropy")
        ]
    cases = [replace(case, seed=arguments.seed) for case in cases]
    return [case for case in cases if arguments.match is None or arguments.match in case.name]


def _cases_like(arguments: argparse.Namespace, heads: user_shapes.Heads) -> list[Case]:
    """The cases at the shapes of a user's model, forward and backward alone."""
    taken = ("providers", "goals", "match", "shape", "top_k")
    refused = [f"--{name.replace('_', '-')}" for name in taken if getattr(arguments, name)]
    if refused:
        raise UserError(f"--like says what is measured at which shapes; leave {' and '.join(refused)} out")
    arguments.modes = ["full"]
    cases = user_shapes.cases_of(
        heads,
        arguments.losses or user_shapes.LOSSES,
        arguments.tokens or [user_shapes.TOKENS],
        arguments.dtype,
        arguments.ignored or [0.0],
    )
    return [replace(case, seed=arguments.seed) for case in cases]


def _run(
    arguments: argparse.Namespace, device: str, cases: list[Case], providers: list[str], scratch: Path
) -> Iterator[list[dict]]:
    """All results so far, after every process: a long run that is stopped has left its tables."""
    job = {
        "device": device,
        "modes": arguments.modes,
        "runs": arguments.runs,
        "warmup_ms": arguments.warmup_ms,
        "rep_ms": arguments.rep_ms,
        "oracles": str(scratch),
    }
    exact = [case for case in cases if not arguments.like and (not arguments.goals or goals.runs("oracle", case))]
    if exact:
        print(f"oracle: {len(exact)} case(s) in float64", file=sys.stderr)
        oracle = {"provider": "oracle", "errors": False, "cases": [case.as_dict() for case in exact]}
        failed = _process(job | oracle, arguments, scratch)
        if failed:
            raise SystemExit(f"the oracle failed: {failed[-1].get('skipped')}")
    order = random.Random(arguments.seed)
    results = []
    unavailable: set[str] = set()
    for repeat in range(arguments.repeats):
        order.shuffle(providers)
        for position, provider in enumerate(providers):
            chosen = [case for case in cases if not arguments.goals or goals.runs(provider, case)]
            if provider in unavailable or not chosen:
                continue
            print(
                f"repeat {repeat + 1}/{arguments.repeats}, {position + 1}/{len(providers)}: {provider}", file=sys.stderr
            )
            mine = {"provider": provider, "errors": repeat == 0, "cases": [case.as_dict() for case in chosen]}
            found = _process(job | mine, arguments, scratch)
            results += found
            if all("skipped" in result for result in found):
                unavailable.add(provider)
            yield results


@contextmanager
def _busy(count: int) -> Iterator[None]:
    """Processes that compute, and do nothing else, until the measurement is over or this process is."""
    loop = f"import os\nwhile os.getppid() == {os.getpid()}:\n    sum(range(100_000))"
    processes = [subprocess.Popen([sys.executable, "-c", loop]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _process(job: dict, arguments: argparse.Namespace, scratch: Path) -> list[dict]:
    path = scratch / "job.json"
    path.write_text(json.dumps(job), encoding="utf-8")
    environment = dict(os.environ)
    if arguments.threads:
        environment |= {"OMP_NUM_THREADS": str(arguments.threads)}
    command = [sys.executable, "-W", "ignore", "-m", "minillm.benchmarks.measure", str(path)]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=arguments.timeout)
        output, why = done.stdout, f"the process ended with status {done.returncode}"
        complaint = done.stderr.strip().rpartition("\n")[2][:200]
        why += f": {complaint}" if complaint else ""
        complete = done.returncode == 0
    except subprocess.TimeoutExpired as timeout:
        output = (timeout.stdout or b"").decode(errors="replace")
        why, complete = f"took longer than {arguments.timeout} s", False
    results = [json.loads(line) for line in output.splitlines() if line.startswith('{"case"')]
    if complete:
        return results
    names = [Case(**entry).name for entry in job["cases"]]
    reached = {result["case"] for result in results}
    missing = [name for name in names if name not in reached] or names[-1:]
    reasons = [why] + [f"not reached: {why}"] * (len(missing) - 1)
    return results + [
        {"case": name, "provider": job["provider"], "mode": "all", "skipped": reason}
        for name, reason in zip(missing, reasons, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main())
