"""The display of a run: tables and one progress bar on a terminal, plain lines elsewhere, nothing on ranks above 0."""

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from minillm.distributed.launcher import launched_rank
from minillm.reporting.markdown import MISSING, duration, number
from minillm.reporting.metric import Metric, metrics_in
from minillm.reporting.time_left import Limits, TimeLeft

SHOWN_SAMPLES = 3  # of an evaluation; samples.jsonl has all of them
PLAIN_SECONDS = 5.0  # between lines of progress without a terminal
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Console:
    """The display of one run. Use it as a context, so that the terminal is left as it was."""

    def __init__(
        self, *, rank: int | None = None, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ):
        """Args: rank: of this process, default $RANK or 0. file: default stdout. clock: seconds."""
        rank = launched_rank() if rank is None else rank
        self._rich = RichConsole(file=file, quiet=rank > 0, highlight=False)
        self._live = rank == 0 and self._rich.is_terminal
        self._clock, self._last_line = clock, -PLAIN_SECONDS
        self._progress: Progress | None = None
        self._time_left = TimeLeft(Limits(), resumed=False)
        self._stage = ""
        self._best: dict[str, float] = {}

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Stop the progress bar, if one runs."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def preflight(self, rows: Sequence[Sequence[str]], *, beside_teacher: str = "student") -> None:
        """Show what is about to be trained, in rows of (what, student, teacher) or (what, value).

        `beside_teacher` is the model of the second column, where it is another than the student.
        """
        self.close()
        if not self._live:
            for name, *values in rows:
                self._line(f"{name}: {' | '.join(str(value) for value in values if value != '')}")
            return
        grid = Table(box=box.SIMPLE_HEAD, title="Preflight", title_justify="left")
        for heading in ("", beside_teacher, "teacher"):
            grid.add_column(heading, overflow="fold")
        for name, *values in rows:
            grid.add_row(Text(str(name), "bold"), *(_text(str(value)) for value in values))
        self._rich.print(grid)

    def start(self, stage: str, limits: Limits, done: int) -> None:
        """Begin a stage, or go on after `done` of its steps."""
        self.close()
        self._stage, self._time_left = stage, TimeLeft(limits, resumed=done > 0)
        self._last_line = -PLAIN_SECONDS
        if not self._live:
            self._line(f"stage {stage}: step {done} of {self._total}")
            return
        self._show_bar(stage, f"{done}/{self._total}")

    def prepare(self, stage: str) -> None:
        """Begin a stage that takes no step."""
        self.close()
        self._stage, self._last_line = stage, -PLAIN_SECONDS
        if self._live:
            self._show_bar(stage, "")
        else:
            self._line(f"stage {stage}: it takes no step")

    def _show_bar(self, stage: str, steps: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[steps]}", markup=False),
            TextColumn("{task.fields[status]}", markup=False),
            console=self._rich,
            refresh_per_second=4,
        )
        # the bar is of time, whatever ends the stage
        self._progress.add_task(stage, total=None, steps=steps, status="")
        self._progress.start()

    def step(self, record: Mapping[str, Any]) -> None:
        """Show one optimiser step, from its record as metrics.jsonl has it."""
        steps = f"{record['stage_step']}/{self._total}"
        left = self._time_left.after(record)
        status = " · ".join(self._status(record, left))
        if self._progress is not None:
            total = None if left is None else record["seconds"] + left
            task = self._progress.task_ids[0]
            self._progress.update(task, total=total, completed=record["seconds"], steps=steps, status=status)
            return
        now = self._clock()
        if now - self._last_line >= PLAIN_SECONDS or record["stage_step"] == self._time_left.limits.steps:
            self._last_line = now
            self._line(f"{self._stage} {steps}: {status}")

    @property
    def _total(self) -> str:
        steps = self._time_left.limits.steps
        return "?" if steps is None else str(steps)

    def working(self, what: str, done: int, total: int) -> None:
        """Show the progress of long work between two steps."""
        status = f"{what} {done:,}/{total:,}"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], status=status)
            return
        now = self._clock()
        if not self._live and done < total and now - self._last_line >= PLAIN_SECONDS:
            self._last_line = now
            self._line(f"{self._stage}: {status}")

    def evaluation(self, record: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        """Show an evaluation against the best so far, and some of its answers."""
        who, stage = record.get("who", "student"), record["stage"]
        moment = "the teacher" if who == "teacher" else f"step {record['stage_step']}"
        self.measurement(f"Evaluation of {moment} of stage {stage}", record["sets"], record["mean"], samples, who=who)

    def measurement(
        self,
        title: str,
        sets: Mapping[str, Mapping[str, float]],
        mean: Mapping[str, float],
        samples: Sequence[Mapping[str, Any]],
        *,
        who: str = "student",
    ) -> None:
        """Show the metrics of a student or teacher, a student's best values before, and some of the answers."""
        several = sets if len(sets) > 1 else {}
        rows = []
        for metric in metrics_in([mean]):
            best = self._best_before(metric, mean[metric.key]) if who == "student" else ""
            rows.append([metric.heading, metric.show(mean), best, *map(metric.show, several.values())])
        self.table(title, ["", "mean" if several else "value", "best before", *several], rows)
        self._samples(_of_every_set(samples, SHOWN_SAMPLES), who)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show numbers with their names; columns without any entry are left out."""
        empty = ("", MISSING)
        if not self._live:
            self._line(title)
            for name, *cells in rows:
                values = (f"{head} {cell}" for head, cell in zip(header[1:], cells, strict=True) if cell not in empty)
                self._line(f"  {name}: {', '.join(values)}")
            return
        kept = [column for column in range(len(header)) if not column or any(row[column] not in empty for row in rows)]
        grid = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
        for column in kept:
            grid.add_column(header[column], justify="right" if column else "left")
        for row in rows:
            grid.add_row(*(_text(row[column]) for column in kept))
        self._rich.print(grid)

    def answers(self, title: str, texts: Mapping[str, str]) -> None:
        """Show full texts under their names, beside each other where there is room."""
        if not self._live:
            for name, text in texts.items():
                self._line(f"[{name}] {clean(text)}")
            return
        grid = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", expand=True)
        for name in texts:
            grid.add_column(name, ratio=1, overflow="fold")
        grid.add_row(*(_text(text) for text in texts.values()))
        self._rich.print(grid)

    def note(self, text: str) -> None:
        """Show one line about something unusual."""
        self._line(clean(text))

    def finish(self, folder: Path) -> None:
        """Show where a finished run has left its model and report."""
        self.close()
        self._line(f"done: the model is in {folder / 'final'}, the report is {folder / 'report.md'}")

    def _best_before(self, metric: Metric, value: float) -> str:
        """The best value of a metric until now, and a word where this one beats it and is remembered in its place."""
        best = self._best.get(metric.key)
        if not metric.better or not math.isfinite(value):
            return ""
        beaten = best is None or metric.better * value > metric.better * best
        if beaten:
            self._best[metric.key] = value
        return "" if best is None else metric.show({metric.key: best}) + (", beaten" if beaten else "")

    def _status(self, record: Mapping[str, Any], left: float | None) -> list[str]:
        parts = [f"loss {number(record['loss'])}"]
        if "reverse_kl_nats" in record:
            parts.append(f"reverse KL {number(record['reverse_kl_nats'])}")
        parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
        if left is not None:
            parts.append(f"ETA {duration(round(left))}")
        return parts

    def _samples(self, samples: Sequence[Mapping[str, Any]], who: str) -> None:
        columns = ("prompt", "answer", "teacher", "reference")
        headings = {"answer": who}
        shown = [name for name in columns if any(name in sample for sample in samples)]
        if not self._live:
            for sample in samples:
                self._line(f"Sample {sample['index']} of {sample['set']}")
                for name in shown:
                    if name in sample:
                        one_line = " ".join(clean(sample[name]).split())
                        self._line(f"  {headings.get(name, name)}: {_cut(one_line, 200, keep_end=name == 'prompt')}")
            return
        if not samples:
            return
        grid = Table(box=box.SIMPLE_HEAD, title="Samples", title_justify="left", show_lines=True, expand=True)
        for name in shown:
            grid.add_column(headings.get(name, name), ratio=1, overflow="fold")
        for sample in samples:
            # the end of a prompt is what the answer goes on from
            grid.add_row(*(_text(_cut(sample.get(name, ""), 300, keep_end=name == "prompt")) for name in shown))
        self._rich.print(grid)

    def _line(self, text: str) -> None:
        self._rich.out(text, highlight=False)
        if not self._live:
            self._rich.file.flush()


def clean(text: str) -> str:
    """Replace the control characters by which a model's answer could steer the terminal; line ends and tabs stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _text(text: str) -> Text:
    return Text(clean(text).strip("\n"))


def _cut(text: str, limit: int, *, keep_end: bool = False) -> str:
    if len(text) <= limit:
        return text
    return f"… {text[-limit:].lstrip()}" if keep_end else f"{text[:limit].rstrip()} …"


def _of_every_set(samples: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """The first samples of all sets, taken in turn."""
    turns: dict[str, int] = {}
    order = []
    for place, sample in enumerate(samples):
        turns[sample["set"]] = turns.get(sample["set"], 0) + 1
        order.append((turns[sample["set"]], place))
    return [samples[place] for _, place in sorted(order)[:count]]
