"""`minillm bench rollout`: sampling from a student and from a mixture, beside transformers' `generate`.

Every provider answers the same prompts with the same random models, in turns, in one process; a ratio is the median
over the turns of what was taken in each: over `generate` with its dynamic cache or whatever `--over` names, and of answers
that end over those that run to the limit. The mixture's peer is a LogitsProcessor that runs the teacher with a dynamic cache of its own. With a
static cache `generate` compiles the student on a GPU. Our side records the log-probability of every token; `generate`
does not. On a CPU with one thread seconds are those of this process, so that a machine that others use gives the same
ratios; elsewhere they are the clock's.
"""

import argparse
import csv
import heapq
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minillm.benchmarks.machine import as_table, describe
from minillm.benchmarks.measure import peak_bytes
from minillm.benchmarks.rollout_providers import (
    ALPHA,
    BASELINE,
    PROVIDERS,
    Drawn,
    Run,
    make_model,
    make_prompts,
    prepare,
    why_not,
)
from minillm.models.device import pick_device
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models

MODES = ("student", "mixture")
LENGTHS = ("full", "ending")  # every answer as long as allowed, or ended by an EOS on the way
DTYPES = ("float32", "bfloat16", "float16")
COLUMNS = (
    "hidden",
    "layers",
    "vocab",
    "mode",
    "answers",
    "provider",
    "tokens_per_s",
    "with_prompts_per_s",
    "ratio",
    "over_full",
    "peak_mib",
)


@dataclass(frozen=True)
class Case:
    """The models, prompts and answers of one line of the table."""

    hidden: int
    layers: int
    vocab: int
    mode: str
    answers: str


@dataclass(frozen=True)
class Timing:
    """One provider on one case, medians over the repeats."""

    case: Case
    provider: str
    rate: float  # response tokens a second
    whole_rate: float  # tokens a second that were read or drawn: those of prompts and answers
    ratio: float | None  # over the baseline's, None where that was not run
    over_full: float | None  # of answers that end, over its own where they run to the limit
    peak_mib: float | None  # held beside the models, None where that is not known
    occupancy: float | None  # of answers that end: `best_occupancy`

    def cells(self) -> list[str]:
        case = self.case
        return [
            *map(str, (case.hidden, case.layers, case.vocab, case.mode, case.answers)),
            PROVIDERS[self.provider],
            f"{self.rate:.0f}",
            f"{self.whole_rate:.0f}",
            *("" if one is None else f"{one:.2f}" for one in (self.ratio, self.over_full)),
            "" if self.peak_mib is None else f"{self.peak_mib:.0f}",
        ]


def main(argv: list[str] | None = None) -> int:
    """Measures and prints a table; writes it with --output. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    device = pick_device(arguments.device)
    arguments.dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    several = arguments.answers_per_prompt
    skipped = {one: why for one in arguments.providers if (why := why_not(one, device, several)) is not None}
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        machine = describe(device.type, threads=arguments.threads)
        timings = [timing for shape in arguments.shapes for timing in _measure_shape(shape, arguments, device, skipped)]
    finally:
        torch.set_num_threads(before)
    page = _markdown(timings, skipped, machine, arguments)
    print(page)
    if arguments.output:
        folder = Path(arguments.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rollout.md").write_text(page, encoding="utf-8")
        with (folder / "rollout.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *(timing.cells() for timing in timings)])
        print(f"written to {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm bench rollout", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        default=[(128, 4), (512, 8)],
        metavar="HIDDENxLAYERS",
        help="of student and teacher (default: 128x4 512x8)",
    )
    parser.add_argument("--vocab", type=int, default=32_000, help="default: %(default)s")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--answers", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument(
        "--over", choices=list(PROVIDERS), default=BASELINE, help="what the ratio is over (default: %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: bfloat16 on a GPU, float32 on a CPU)")
    parser.add_argument("--prompts", type=int, default=96, help="default: %(default)s")
    parser.add_argument("--answers-per-prompt", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="answered side by side (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of the longest prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and order (default: %(default)s)")
    parser.add_argument("--output", help="folder for rollout.md and rollout.csv (default: print only)")
    return parser


def _shape(text: str) -> tuple[int, int]:
    try:
        hidden, layers = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HIDDENxLAYERS, such as 128x4") from None
    return hidden, layers


def _measure_shape(
    shape: tuple[int, int], arguments: argparse.Namespace, device: torch.device, skipped: dict[str, str]
) -> list[Timing]:
    dtype = getattr(torch, arguments.dtype)
    models = [make_model(*shape, arguments.vocab, arguments.seed + place).to(device, dtype) for place in range(2)]
    prompts, timings = make_prompts(arguments), []
    for mode in arguments.modes:
        mixed = mode == "mixture"  # otherwise no coin decides anything
        chosen = [one for one in arguments.providers if one not in skipped and (mixed or one != "ours-coins")]
        runs: dict[tuple[str, str], Run] = {}
        for answers in arguments.answers:
            # about one EOS in 24 tokens of a random model
            eos_ids = tuple(range(1, arguments.vocab, 24)) if answers == "ending" else ()
            student, teacher = models
            pair = Models(student, LocalTeacher(teacher), None, arguments.vocab, eos_ids, 0, device)
            runs |= {(answers, provider): prepare(provider, mode, pair, prompts, arguments) for provider in chosen}
        cases = {answers: Case(*shape, arguments.vocab, mode, answers) for answers in arguments.answers}
        print(*cases.values(), sep="\n", file=sys.stderr)
        timings += _compare(cases, runs, arguments, device)
    return timings


def _compare(
    cases: dict[str, Case],
    runs: dict[tuple[str, str], Run],  # by the case and the provider
    arguments: argparse.Namespace,
    device: torch.device,
) -> list[Timing]:
    for run in runs.values():
        run(0)
    peaks = {which: peak_bytes(lambda run=run: run(0), device) for which, run in runs.items()}
    order = random.Random(arguments.seed)
    rates: dict[tuple[str, str], list[float]] = {which: [] for which in runs}
    drawn: dict[tuple[str, str], list[Drawn]] = {which: [] for which in runs}
    for repeat in range(1, arguments.repeats + 1):
        for which in order.sample(sorted(runs), len(runs)):
            start = _seconds(device)
            drawn[which].append(runs[which](repeat))
            rates[which].append(drawn[which][-1].tokens / (_seconds(device) - start))
    timings = []
    for (answers, provider), mine in rates.items():
        done, peak, ends = drawn[answers, provider], peaks[answers, provider], answers == "ending"
        timings.append(
            Timing(
                cases[answers],
                provider,
                statistics.median(mine),
                statistics.median(
                    rate * (one.tokens + one.prompt_tokens) / one.tokens for rate, one in zip(mine, done, strict=True)
                ),
                _ratio(mine, rates.get((answers, arguments.over))),
                _ratio(mine, rates.get(("full", provider))) if ends else None,
                None if peak is None else peak / 2**20,
                statistics.median(best_occupancy(one.lengths, arguments.batch_size) for one in done) if ends else None,
            )
        )
    return timings


def best_occupancy(lengths: list[int], rows: int) -> float:
    """The mean part of the rows that answers go on in, where each takes the first row that is free: no order that knows none
    of the lengths does better in the mean. The first token of an answer is drawn where its prompt is read, outside of them."""
    free_at = [0] * rows
    for length in lengths:
        heapq.heapreplace(free_at, free_at[0] + length - 1)
    return sum(length - 1 for length in lengths) / (rows * max(1, *free_at))


def _ratio(mine: list[float], theirs: list[float] | None) -> float | None:
    return None if theirs is None else statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def _seconds(device: torch.device) -> float:
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def _markdown(
    timings: list[Timing], skipped: dict[str, str], machine: dict[str, str], arguments: argparse.Namespace
) -> str:
    several = f"{arguments.answers_per_prompt} answers to each, " if arguments.answers_per_prompt > 1 else ""
    settings = {
        "answers": f"{arguments.prompts} prompts of up to {arguments.prompt_tokens} tokens, {several}{arguments.batch_size} "
        f"side by side, at most {arguments.tokens} new",
        "weights": arguments.dtype,
        "repeats": arguments.repeats,
        "alpha": ALPHA,
        **{f"skipped: {PROVIDERS[provider]}": why for provider, why in skipped.items()},
    }
    lines = [
        "# Rollouts",
        "",
        "| hidden | layers | vocabulary | sampled from | answers | | tokens/s | with prompts | "
        f"over {PROVIDERS[arguments.over]} | over full | peak, MiB |",
        "|--:|--:|--:|---|---|---|--:|--:|--:|--:|--:|",
        *("| " + " | ".join(timing.cells()) + " |" for timing in timings),
        "",
        "Medians over the repeats; the ratio is taken in each repeat, in which all run one after the other. "
        "`ending`: answers end at an EOS, about one token in 24; tokens up to it are counted. `with prompts`: tokens of answers "
        "and of the prompts that were read, a second. `over full`: over the same where all answers run to the limit. `peak`: "
        "memory of one call beside the models.",
        "",
        *_bounds(timings, arguments),
        *as_table({**machine, **settings}),
    ]
    return "\n".join(lines) + "\n"


def _bounds(timings: list[Timing], arguments: argparse.Namespace) -> list[str]:
    """The rows that answers which end could fill, by what `minillm` drew."""
    found = [f"{one.occupancy:.2f} ({one.case.mode})" for one in timings if one.provider == "ours" and one.occupancy]
    if not found:
        return []
    return [
        f"Answers that end, each beginning as soon as one of the {arguments.batch_size} rows is free, fill these parts of the "
        f"rows to the last token: {', '.join(dict.fromkeys(found))}. Where a pass costs the same whatever its rows, `over full` is "
        "no more, with prompts read for nothing.",
        "",
    ]


if __name__ == "__main__":
    sys.exit(main())
