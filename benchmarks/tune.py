"""`minillm bench tune`: which sizes of blocks, tiles and chunks are the fastest on this GPU, beside those in use.

The machine's ceilings first (a copy, the head products), then the kernels with every size that is worth a try, each
compared with the result of the sizes in use before it is timed, then whole losses, and where the time of one goes. It
changes nothing: the sizes are constants of the modules that it names. Needs torch and triton alone.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minillm.benchmarks.cases import Case, Inputs, make_inputs
from minillm.benchmarks.goals import LARGE
from minillm.benchmarks.machine import as_table, describe
from minillm.benchmarks.tune_variants import VARIANTS, Variant, applied
from minillm.losses import linear_divergence

WARMUP_MS, REP_MS = 25, 150
SAME = 1e-3  # relative L2: another order of summation, and bf16 gradients
PARTS = (*VARIANTS, "profile")


@dataclass(frozen=True)
class Timing:
    variant: Variant
    milliseconds: float
    error: float | None  # from what the sizes in use give; None for those themselves and where nothing is compared
    failure: str | None = None

    @property
    def rate(self) -> float:
        return self.variant.amount / self.milliseconds * 1e3 / (1e12 if self.variant.unit == "TFLOP/s" else 1e9)

    def line(self) -> str:
        head = f"| {self.variant.part} | {self.variant.name} | {'now' if self.variant.current else ''} |"
        if self.failure:
            return f"{head} | | {self.failure} |"
        different = self.error is not None and not self.error < SAME
        note = f"other results: {self.error:.1e}" if different else ""
        return f"{head} {self.milliseconds:.4g} | {self.rate:,.4g} {self.variant.unit} | {note} |"


HEADER = ("| part | variant | | ms | rate | |", "|---|---|---|--:|--:|---|")


def measure(variants: Iterator[Variant], median_ms: Callable[[Callable[[], object]], float]) -> Iterator[Timing]:
    """One timing a variant. One that fails, for want of registers or shared memory say, is a result as well."""
    expected = None
    for variant in variants:
        error = None
        try:
            if variant.current:
                expected = variant.value()
            elif expected is not None:
                found = variant.value()
                error = (torch.linalg.vector_norm((found - expected).float()) / expected.float().norm()).item()
            with applied(variant.settings):
                timing = Timing(variant, median_ms(variant.run), error)
        except Exception as failure:
            timing = Timing(variant, math.nan, None, _reason(failure))
        yield timing


def _reason(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip().partition(chr(10))[0]}"[:120]


def profile(inputs: Inputs, rows: int = 14) -> str:
    """The time of one forward and backward pass, by kernel."""
    from torch.profiler import ProfilerActivity

    leaves = inputs.student_hidden, inputs.student_weight

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        linear_divergence(*leaves, inputs.teacher_hidden, inputs.teacher_weight).backward()

    run()
    on_gpu = inputs.labels.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=by, row_limit=rows, max_name_column_width=70).rstrip()


def _median_ms(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return do_bench(run, warmup=WARMUP_MS, rep=REP_MS, return_mode="median")


def main(argv: list[str] | None = None) -> int:
    """Measures, prints a line a variant as it gets there, writes tune.md with --output. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("minillm bench tune: sizes are tuned on a GPU, and torch sees none here", file=sys.stderr)
        return 2
    case = replace(LARGE, tokens=arguments.tokens)
    if arguments.shape:
        names = "student_hidden", "teacher_hidden", "vocab"
        case = replace(case, **dict(zip(names, arguments.shape, strict=True)))
    torch.backends.cuda.matmul.allow_tf32 = False
    print(report(case, torch.device("cuda"), arguments.parts, _median_ms, arguments.output))
    return 0


def report(
    case: Case,
    device: torch.device,
    parts: list[str],
    median_ms: Callable[[Callable[[], object]], float],
    output: str | None,
) -> str:
    """The page. Its lines are printed and written as they come: what a run that is stopped has measured is there."""
    inputs = make_inputs(case, device)
    lines = [f"# Sizes for {case.name}", "", *HEADER]
    path = None if output is None else Path(output) / "tune.md"
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    for part in (part for part in VARIANTS if part in parts):
        try:
            for timing in measure(VARIANTS[part](inputs), median_ms):
                lines.append(timing.line())
                print(lines[-1], file=sys.stderr, flush=True)
                _write(path, lines)
        except Exception as failure:  # in what a part prepares: the others go on
            lines.append(f"| {part} | | | | | {_reason(failure)} |")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if "profile" in parts:
        try:
            lines += ["", "```", profile(inputs), "```"]
        except Exception as failure:
            lines += ["", f"no profile: {_reason(failure)}"]
    lines += ["", *as_table(describe(device.type)), ""]
    _write(path, lines)
    return "\n".join(lines)


def _write(path: Path | None, lines: list[str]) -> None:
    if path is not None:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm bench tune", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tokens", type=int, default=LARGE.tokens, help="default: %(default)s")
    parser.add_argument("--shape", nargs=3, type=int, metavar=("H_STUDENT", "H_TEACHER", "VOCABULARY"))
    parser.add_argument("--output", help="folder for tune.md (default: print only)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
