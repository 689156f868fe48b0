"""The pictures of an experiment: every arm's evaluations while training, and where the arms ended, over the seeds."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from minillm.evaluate.seeds import over_seeds
from minillm.experiment.measures import metric_of
from minillm.experiment.results import Result, Results
from minillm.reporting.metric import find_metric
from minillm.reporting.panels import COLOURS, DASHES, MARKERS, TEACHER, draw_panels, dress, pick
from minillm.storage.metrics_log import read_numbers

AXES = {"student_tokens": "student tokens", "seconds": "training time (s)"}


def draw_curves(results: Results, measures: Sequence[str], path: Path, *, along: str = "student_tokens") -> bool:
    """Write a PNG of means over the seeds against tokens or time, one panel per measure; False where there is nothing.

    The first evaluations of the seeds are averaged, the second ones, and so on, as many as all of them have.
    """
    keys = [key for key in measures if find_metric(key) is not None]
    lines = {key: {arm: _line(list(seeds.values()), key, along) for arm, seeds in results.arms.items()} for key in keys}
    keys = [key for key in keys if any(len(line) > 1 for line in lines[key].values())]

    def draw(panel: Axes, key: str) -> None:
        metric = metric_of(key)
        for place, (arm, line) in enumerate(lines[key].items()):
            if len(line) > 1:
                colour = pick(COLOURS, place)
                x = [point[0] for point in line]
                means, deviations = ([metric.scale * point[part] for point in line] for part in (1, 2))
                dashes = pick(DASHES, place // len(COLOURS))
                panel.plot(
                    x, means, linestyle=dashes, color=colour, marker=pick(MARKERS, place), markersize=3.5, label=arm
                )
                low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
                panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        dress(panel, metric.title, metric.unit, AXES[along])

    return draw_panels(keys, draw, path)


def _line(runs: Sequence[Result], key: str, along: str) -> list[tuple[float, float, float]]:
    """(mean place, mean, deviation) of each evaluation that all runs have, in order."""
    tracks = [[(record[along], read_numbers(record["mean"]).get(key)) for record in run.evaluations] for run in runs]
    tracks = [[point for point in track if point[1] is not None] for track in tracks]
    tracks = [track for track in tracks if track]
    line = []
    for points in zip(*tracks, strict=False):
        mean, deviation = over_seeds([value for _, value in points])
        line.append((over_seeds([place for place, _ in points])[0], mean, deviation or 0.0))
    return line


def draw_ends(results: Results, measures: Sequence[str], path: Path) -> bool:
    """Write a PNG of the arms' ends, one panel per measure: a bar with its deviation, one dot per seed, the teacher."""
    keys = [key for key in measures if any(results.values(arm, key) for arm in results.arms)]

    def draw(panel: Axes, key: str) -> None:
        metric = metric_of(key)
        arms = list(results.arms)
        for place, arm in enumerate(arms):
            values = results.values(arm, key)
            mean, deviation = over_seeds(values.values())
            if mean is None:
                continue
            colour = pick(COLOURS, place)
            error = None if deviation is None else metric.scale * deviation
            panel.barh(place, metric.scale * mean, xerr=error, color=colour, alpha=0.75, capsize=2.5)
            dots = [metric.scale * value for value in values.values()]
            panel.plot(dots, [place] * len(dots), "k.", markersize=3)
        teachers = {
            results.teachers[arm][seed].value(key) for arm in results.teachers for seed in results.teachers[arm]
        }
        for value in teachers - {None}:
            panel.axvline(metric.scale * value, color=TEACHER, linestyle=(0, (5, 3)), linewidth=1.1)
        dress(panel, metric.title, "", metric.unit)
        panel.set_yticks(range(len(arms)), arms)
        panel.invert_yaxis()

    return draw_panels(keys, draw, path, height=0.9 + 0.24 * len(results.arms))
