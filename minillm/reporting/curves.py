"""The picture of a run, or of several side by side: evaluations first, then what the optimiser saw.

One panel per metric, one colour per stage or run. Along the axis a stage begins where the one that its student came from
ended, so that two stages with the same beginning lie over each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from minillm.config.root import method_class
from minillm.reporting.metric import METRICS, Metric, metrics_in
from minillm.reporting.panels import COLOURS, COLUMNS, DASHES, GREY, MARKERS, TEACHER, dress, grid, pick, save
from minillm.reporting.run_files import RunFiles, StageFiles, stage_label
from minillm.storage.metrics_log import read_numbers

SMOOTHED_POINTS = 60  # of a training curve: as many means of neighbouring steps


@dataclass(frozen=True)
class Curve:
    """One stage's line in every panel of evaluations."""

    label: str
    colour: str
    marker: str
    dashes: str | tuple
    stage: StageFiles
    run: RunFiles


@dataclass(frozen=True)
class Axis:
    """The axis along all panels: steps, or training time where stages were compared by it."""

    by_time: bool
    divisor: float  # seconds in a unit
    label: str

    @classmethod
    def of(cls, runs: Sequence[RunFiles]) -> "Axis":
        stages = [(run, stage) for run in runs for stage in run.stages.values()]
        if not any(stage.timed_by for _, stage in stages):
            return cls(False, 1.0, "training steps")
        longest = max(stage.seconds + sum(one.seconds for one in run.lineage(stage)) for run, stage in stages)
        divisor, unit = (3600.0, "h") if longest > 2 * 3600 else (60.0, "min") if longest > 300 else (1.0, "s")
        return cls(True, divisor, f"training time ({unit})")

    def place(self, steps: float, seconds: float) -> float:
        return seconds / self.divisor if self.by_time else steps

    def start(self, run: RunFiles, stage: StageFiles) -> float:
        return sum(self.place(one.steps, one.seconds) for one in run.lineage(stage))


def draw_run(run: RunFiles, path: Path) -> bool:
    """Write the PNG of one run; returns False, and leaves no file, where nothing has been measured yet."""
    stages = [stage for stage in run.stages.values() if stage.started]
    curves = [
        Curve(stage.name, pick(COLOURS, place), pick(MARKERS, place), "-", stage, run)
        for place, stage in enumerate(stages)
    ]
    return _draw(curves, path, with_losses=True)


def draw_comparison(runs: dict[str, RunFiles], path: Path) -> bool:
    """Write the PNG of several runs, a colour for each run and dashes for each stage; returns what draw_run does."""
    curves = [
        Curve(
            stage_label(label, run, stage),
            pick(COLOURS, place),
            pick(MARKERS, order),
            pick(DASHES, order),
            stage,
            run,
        )
        for place, (label, run) in enumerate(runs.items())
        for order, stage in enumerate(stage for stage in run.stages.values() if stage.started)
    ]
    return _draw(curves, path, with_losses=False)


def _draw(curves: list[Curve], path: Path, *, with_losses: bool) -> bool:
    measured = [one.mean for curve in curves for one in curve.stage.evaluations]
    trained = [metric for metric in METRICS if any(_has(curve, metric) for curve in curves)]
    metrics = [*trained, *(metric for metric in metrics_in(measured) if metric not in trained)]
    metrics += [metric for metric in _of_methods(curves) if metric.key not in {one.key for one in metrics}]
    losses = [curve for curve in curves if curve.stage.train] if with_losses else []
    if not metrics and not losses:
        path.unlink(missing_ok=True)
        return False
    figure, panels = grid(len(metrics) + len(losses))
    axis = Axis.of([curve.run for curve in curves])
    for panel, metric in zip(panels, metrics, strict=False):
        _draw_metric(panel, metric, curves, axis)
    for panel, curve in zip(panels[len(metrics) :], losses, strict=False):
        _draw_losses(panel, curve, alone=len(curves) == 1)
    _legend(figure, curves, metrics)
    save(figure, path)
    return True


def _of_methods(curves: list[Curve]) -> list[Metric]:
    """The metrics that the stages' methods declare to have a panel of their own, as far as records have them."""
    declared = {}
    for curve in curves:
        keys = curve.stage.settings.get("method", {})
        config_class = method_class(keys.get("name", ""))
        for key, (title, unit) in ({} if config_class is None else config_class.panels_of(keys)).items():
            declared.setdefault(key, Metric(key, title, unit, better=0))
    return [metric for metric in declared.values() if any(_has(curve, metric) for curve in curves)]


def _has(curve: Curve, metric: Metric) -> bool:
    evaluated = any(metric.key in measurement.mean for measurement in curve.stage.evaluations)
    return evaluated or bool(_trained(curve.stage, metric.key))


def _trained(stage: StageFiles, key: str) -> list[tuple[float, float, float]]:
    """(step, seconds, value) of a metric of the training batches."""
    found = []
    for record in stage.train:
        value = read_numbers({key: record.get(key)}).get(key)
        if value is not None:
            found.append((record["stage_step"], record["seconds"], value))
    return found


def _draw_metric(panel: Axes, metric: Metric, curves: list[Curve], axis: Axis) -> None:
    scale = metric.scale
    for curve in curves:
        start = axis.start(curve.run, curve.stage)
        trained = _trained(curve.stage, metric.key)
        if trained:
            places, values = _smoothed([(start + axis.place(step, seconds), value) for step, seconds, value in trained])
            panel.plot(places, scale * values, color=curve.colour, linewidth=1.0, alpha=0.55)
        points = [
            (
                start + axis.place(one.stage_step, one.seconds),
                one.mean[metric.key],
                one.mean.get(f"{metric.key}_std", 0.0),
            )
            for one in curve.stage.evaluations
            if metric.key in one.mean
        ]
        before = curve.run.before(curve.stage)
        if before and before.stage != curve.stage.name and metric.key in before.mean and points:
            points.insert(0, (start, before.mean[metric.key], before.mean.get(f"{metric.key}_std", 0.0)))
        if points:
            places, values, deviations = map(np.array, zip(*points, strict=True))
            panel.errorbar(
                places,
                scale * values,
                yerr=scale * deviations if deviations.any() else None,
                color=curve.colour,
                marker=curve.marker,
                markersize=4.5,
                linestyle=curve.dashes,
                linewidth=1.8,
                capsize=2.5,
            )
        teacher = curve.run.teachers.get(curve.stage.name)
        if teacher and metric.key in teacher.mean:
            panel.axhline(scale * teacher.mean[metric.key], color=TEACHER, linestyle=(0, (5, 3)), linewidth=1.1)
    dress(panel, metric.title, metric.unit, axis.label)
    if all(value >= 0 for line in panel.lines for value in line.get_ydata()):
        panel.set_ylim(bottom=0)


def _draw_losses(panel: Axes, curve: Curve, *, alone: bool) -> None:
    """Draw a stage's loss and its terms. Losses of two methods are not comparable, so that each stage has a panel."""
    names = list(dict.fromkeys(name for record in curve.stage.train for name in record if name.startswith("loss/")))
    drawn = ["loss", *names] if len(names) > 1 else ["loss"]
    for place, name in enumerate(drawn):
        points = [(step, value) for step, _, value in _trained(curve.stage, name)]
        if points:
            places, values = _smoothed(points)
            panel.plot(
                places,
                values,
                color=curve.colour,
                linestyle=pick(DASHES, place),
                linewidth=1.8 if place == 0 else 1.3,
                alpha=1.0 if place == 0 else 0.75,
                marker="o" if len(points) == 1 else None,
                label="total" if name == "loss" else name.removeprefix("loss/"),
            )
    dress(panel, "Training loss" if alone else f"Training loss: {curve.stage.name}", "", "steps of the stage")
    if len(drawn) > 1:
        panel.legend(fontsize=8, frameon=False, handlelength=2.8)


def _smoothed(points: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Means of equally many neighbouring points, SMOOTHED_POINTS of them at most; the last mean may be of fewer."""
    size = -(-len(points) // SMOOTHED_POINTS)
    means = np.array([np.mean(points[start : start + size], axis=0) for start in range(0, len(points), size)])
    return means[:, 0], means[:, 1]


def _legend(figure: Figure, curves: list[Curve], metrics: list[Metric]) -> None:
    handles = [
        Line2D([], [], color=one.colour, marker=one.marker, linestyle=one.dashes, markersize=4.5, label=one.label)
        for one in curves
    ]
    teachers = [teacher for curve in curves for teacher in [curve.run.teachers.get(curve.stage.name)] if teacher]
    if any(metric.key in teacher.mean for teacher in teachers for metric in metrics):
        handles.append(Line2D([], [], color=TEACHER, linestyle=(0, (5, 3)), label="teacher"))
    if any(_trained(curve.stage, metric.key) for curve in curves for metric in metrics):
        handles.append(Line2D([], [], color=GREY, alpha=0.7, linewidth=1.0, label="thin: training batches"))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=min(len(handles), 2 * min(COLUMNS, len(figure.axes))),
        fontsize=9.5,
        frameon=False,
    )
