"""The goals of the kernels on a Hopper GPU, as data: their cases, the providers that must run them, and their bounds.

`minillm bench kernels --goals` measures these alone. Goals are about bf16 inputs and the reverse KL; ratios are between
numbers of one run. "The bare products" are the head products and nothing else, with fp32 logits.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from minillm.benchmarks.cases import Case
from minillm.benchmarks.providers import YARDSTICK
from minillm.benchmarks.tables import Row

LARGE = Case("reverse_kl", 8192, 2048, 5120, 151936)
HALF = replace(LARGE, ignored=0.5)
LONG = replace(LARGE, tokens=4 * LARGE.tokens)
QUARTER = replace(LARGE, vocab=LARGE.vocab // 4)
SMALL = replace(LARGE, vocab=32000)
GPT2 = Case("reverse_kl", 8192, 768, 1600, 50257)
COMPARED = (LARGE, SMALL, GPT2)  # peers run these
CASES = (*COMPARED, HALF, LONG, QUARTER)

OURS, LEAN, TILED = "minillm_triton", "minillm_triton_lean", "minillm_tiled"
ROUNDING_PEERS = ("eager", "torch_compile", "checkpointed", "liger_chunked_compiled")  # their logits are bf16
PEERS = (*ROUNDING_PEERS, "liger_fused_fp32_accum", "trl")
PROVIDERS = (YARDSTICK, OURS, TILED, LEAN, *PEERS)
GIB = 2**30


def runs(provider: str, case: Case) -> bool:
    """True where a goal needs this provider, or the float64 oracle, on this case, whatever its seed."""
    case = replace(case, seed=0)
    if provider in (LEAN, TILED):
        return case == LARGE
    return case in COMPARED or provider in (YARDSTICK, OURS)


@dataclass(frozen=True)
class Goal:
    what: str
    measured: Callable[["Results"], float]
    bound: float
    at_most: bool = True


@dataclass(frozen=True)
class Verdict:
    what: str
    measured: float | None  # None where a number that it needs is missing
    bound: float
    at_most: bool

    @property
    def reached(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


class Missing(Exception):
    """A number that a goal needs and that was not measured."""


class Results:
    """The rows of a run, whatever seed they had."""

    def __init__(self, rows: list[Row], skipped: dict[str, dict[str, str]]):
        self.rows = {(replace(row.case, seed=0), row.provider, row.mode): row for row in rows}
        self.skipped = skipped

    def row(self, case: Case, provider: str = OURS, mode: str = "full") -> Row:
        try:
            return self.rows[case, provider, mode]
        except KeyError:
            raise Missing from None

    def time(self, case: Case, provider: str = OURS, mode: str = "full") -> float:
        return self.row(case, provider, mode).milliseconds[0]

    def over_products(self, case: Case, mode: str) -> float:
        return self.time(case, OURS, mode) / self.time(case, YARDSTICK, mode)

    def speedup(self, case: Case, peer: str) -> float:
        return self.time(case, peer) / self.time(case)

    def compared(self, case: Case, peers: tuple[str, ...], mode: str) -> list[Row]:
        """The peers' rows, without those that cannot run the case: for want of memory, say. A peer that was not tried
        leaves the goal open, as does one that its process did not get to after it had died."""
        failed = ("failed", "the process ended", "took longer")
        rows = []
        for peer in peers:
            if (case, peer, mode) in self.rows:
                rows.append(self.row(case, peer, mode))
            elif not self.skipped.get(peer, {}).get(case.name, "").startswith(failed):
                raise Missing
        if not rows:
            raise Missing
        return rows

    def speedup_over_the_fastest(self, case: Case, mode: str) -> float:
        fastest = min(row.milliseconds[0] for row in self.compared(case, PEERS, mode))
        return fastest / self.time(case, OURS, mode)

    def error_over_the_least(self, case: Case) -> float:
        errors = [_larger_error(row) for row in self.compared(case, ROUNDING_PEERS, "full")]
        return self.error(case) / min((error for error in errors if error == error), default=math.nan)

    def peak(self, case: Case, provider: str) -> float:
        """GiB over the inputs."""
        peak = self.row(case, provider).peak_bytes
        if peak is None:
            raise Missing
        return peak / GIB

    def beside_the_gradients(self, case: Case, provider: str) -> float:
        gradients = 2 * (case.tokens + case.vocab) * case.student_hidden  # in bf16
        return self.peak(case, provider) - gradients / GIB

    def error(self, case: Case, provider: str = OURS) -> float:
        """The larger relative error of the two gradients; NaN where one of them is."""
        return _larger_error(self.row(case, provider))


def _larger_error(row: Row) -> float:
    try:
        return _largest(row.errors[name] for name in ("hidden_grad_error", "weight_grad_error"))
    except KeyError:
        raise Missing from None


def _largest(values: Iterable[float]) -> float:
    """NaN where one is: max would pass over it."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


def _at_most(bound: float, what: str, measured: Callable[[Results], float]) -> Goal:
    return Goal(what, measured, bound)


def _at_least(bound: float, what: str, measured: Callable[[Results], float]) -> Goal:
    return Goal(what, measured, bound, at_most=False)


def _on_other_heads(name: str, case: Case) -> tuple[Goal, Goal]:
    return (
        _at_most(1.25, f"{name}: over the bare products", lambda r: r.over_products(case, "full")),
        _at_least(
            1.0, f"{name}: times as fast as the fastest peer", lambda r: r.speedup_over_the_fastest(case, "full")
        ),
    )


GOALS = (
    _at_most(1.2, "forward and backward over the bare products", lambda r: r.over_products(LARGE, "full")),
    _at_least(1.4, "times as fast as TRL", lambda r: r.speedup(LARGE, "trl")),
    _at_least(2.0, "times as fast as Liger fused", lambda r: r.speedup(LARGE, "liger_fused_fp32_accum")),
    _at_least(1.2, "times as fast as Liger chunked, compiled", lambda r: r.speedup(LARGE, "liger_chunked_compiled")),
    _at_most(2.5, "peak memory over inputs, GiB", lambda r: r.peak(LARGE, OURS)),
    _at_most(1.4, "the same, lean", lambda r: r.peak(LARGE, LEAN)),
    _at_most(0.1, "the same, tiled, beside the gradients", lambda r: r.beside_the_gradients(LARGE, TILED)),
    *_on_other_heads("V=32,000", SMALL),
    *_on_other_heads("GPT-2's heads", GPT2),
    _at_most(1.15, "scoring over the bare products", lambda r: r.over_products(LARGE, "forward")),
    _at_least(
        1.0, "scoring: times as fast as the fastest peer", lambda r: r.speedup_over_the_fastest(LARGE, "forward")
    ),
    _at_most(5e-3, "relative error of the gradients", lambda r: _largest(r.error(case) for case in COMPARED)),
    _at_most(
        0.5,
        "the same over the least of a peer that rounds its logits",
        lambda r: _largest(r.error_over_the_least(case) for case in COMPARED),
    ),
    _at_most(4.2, "time at 4 x the tokens", lambda r: r.time(LONG) / r.time(LARGE)),
    _at_most(4.2, "time at 4 x the vocabulary", lambda r: r.time(LARGE) / r.time(QUARTER)),
    _at_most(
        1.05,
        "memory beside the gradients at 4 x the tokens",
        lambda r: r.beside_the_gradients(LONG, OURS) / r.beside_the_gradients(LARGE, OURS),
    ),
    _at_most(0.55, "time with half of the tokens ignored", lambda r: r.time(HALF) / r.time(LARGE)),
)


def judge(rows: list[Row], skipped: dict[str, dict[str, str]]) -> list[Verdict]:
    """Every goal, in order, on the rows of one run; `skipped` is {provider: {case: why it did not run}}."""
    results, verdicts = Results(rows, skipped), []
    for goal in GOALS:
        try:
            measured = goal.measured(results)
        except Missing:
            measured = None
        verdicts.append(Verdict(goal.what, measured, goal.bound, goal.at_most))
    return verdicts


def as_markdown(verdicts: list[Verdict]) -> str:
    """A table under a heading."""
    words = {True: "reached", False: "missed", None: "not measured"}
    lines = ["## Goals", "", "| goal | bound | measured | |", "|---|--:|--:|---|"]
    for verdict in verdicts:
        bound = f"{'at most' if verdict.at_most else 'at least'} {verdict.bound:g}"
        measured = "" if verdict.measured is None else f"{verdict.measured:.3g}"
        lines.append(f"| {verdict.what} | {bound} | {measured} | {words[verdict.reached]} |")
    large = f"{LARGE.student_hidden:,} and {LARGE.teacher_hidden:,} to {LARGE.vocab:,} ids"
    lines += ["", f"Where nothing else is said: reverse KL, {LARGE.tokens:,} tokens, {large}, bf16."]
    return "\n".join([*lines, ""])
