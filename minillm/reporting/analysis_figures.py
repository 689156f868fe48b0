"""Pictures of the analyses, one line per model: exposure bias, calibration, diversity and loss, Rouge-L by length, and the
map of a delta's vocabulary."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from minillm.reporting.metric import find_metric
from minillm.reporting.panels import COLOURS, DASHES, GREY, MARKERS, draw_panels, dress, pick
from minillm.storage.metrics_log import read_numbers

Found = Mapping[str, Sequence[Mapping[str, Any]]]  # model -> the output of `minillm eval`, one per seed


def draw_analyses(found: Found, folder: Path, *, prefix: str = "") -> list[Path]:
    """Draw the analyses that were made into `folder`; returns the files. Several seeds of a model are averaged."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in PICTURES.items():
        path = folder / f"{prefix}{name}.png"
        if draw(found, path):
            drawn.append(path)
    return drawn


def draw_exposure_bias(found: Found, path: Path) -> bool:
    """Draw the excess accumulated error against length, one panel per set."""

    def draw(panel: Axes, name: str) -> None:
        for place, (model, seeds) in enumerate(found.items()):
            curves = [one["curves"]["exposure_bias"][name] for one in seeds if _curve(one, "exposure_bias", name)]
            if curves:
                student, teacher = (
                    np.mean([np.array(curve[key]) for curve in curves], axis=0) for key in ("on_student", "on_teacher")
                )
                excess = 100 * (student - teacher) / teacher
                lengths = np.arange(1, len(excess) + 1)
                dashes = pick(DASHES, place // len(COLOURS))
                panel.plot(lengths[1:], excess[1:], color=pick(COLOURS, place), linestyle=dashes, label=model)
        panel.axhline(0, color=GREY, linewidth=0.8)
        dress(panel, f"Exposure bias: {name}", "excess error (%)", "tokens of answer")

    return draw_panels(_sets(found, "exposure_bias"), draw, path)


def draw_calibration(found: Found, path: Path) -> bool:
    """Draw accuracy against confidence, one panel per classification set."""

    def draw(panel: Axes, name: str) -> None:
        panel.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=0.8)
        for place, (model, seeds) in enumerate(found.items()):
            curves = [curve for one in seeds if (curve := _curve(one, "calibration", name))]
            points = _pooled(curves)
            if points:
                x, y = zip(*points, strict=True)
                panel.plot(x, y, color=pick(COLOURS, place), marker=pick(MARKERS, place), markersize=4, label=model)
        dress(panel, f"Calibration: {name}", "accuracy", "confidence")

    return draw_panels(_sets(found, "calibration"), draw, path)


def _pooled(curves: Sequence[Mapping[str, list]]) -> list[tuple[float, float]]:
    """(confidence, accuracy) of every bin that any seed has."""
    points = []
    for place in range(len(curves[0]["counts"]) if curves else 0):
        count = sum(curve["counts"][place] for curve in curves)
        if count:
            points.append(
                tuple(
                    sum((curve[key][place] or 0.0) * curve["counts"][place] for curve in curves) / count
                    for key in ("confidence", "correct")
                )
            )
    return points


def draw_diversity(found: Found, path: Path) -> bool:
    """Draw the percentage of distinct n-grams against the loss on the references, one dot per model and seed."""
    keys = [key for key in _keys(found) if key.startswith("distinct_")]
    keys = keys if "loss_nats" in _keys(found) else []

    def draw(panel: Axes, key: str) -> None:
        for place, (model, seeds) in enumerate(found.items()):
            numbers = [read_numbers(one["mean"]) for one in seeds]
            points = [(one["loss_nats"], one[key]) for one in numbers if key in one and "loss_nats" in one]
            if points:
                x, y = zip(*points, strict=True)
                panel.plot(x, y, pick(MARKERS, place), color=pick(COLOURS, place), markersize=5, label=model)
        dress(panel, find_metric(key).title, "%", "loss on references (nats/token)")

    return draw_panels(keys, draw, path)


def draw_length_buckets(found: Found, path: Path) -> bool:
    """Draw Rouge-L by the length of the reference, in one panel."""
    keys = [key for key in _keys(found) if key.startswith("rouge_l_")]

    def draw(panel: Axes, _: str) -> None:
        for place, (model, seeds) in enumerate(found.items()):
            numbers = [read_numbers(one["mean"]) for one in seeds]
            values = [[one[key] for one in numbers if key in one] for key in keys]
            means = [np.mean(value) if value else np.nan for value in values]
            panel.plot(means, color=pick(COLOURS, place), marker=pick(MARKERS, place), markersize=4, label=model)
        dress(panel, "Rouge-L by length of the reference", "F1 × 100", "tokens of the reference")
        panel.set_xticks(range(len(keys)), [_bucket(key) for key in keys])

    return draw_panels(["rouge_l"] if keys else [], draw, path)


def draw_vocabulary_map(found: Found, path: Path) -> bool:
    """Draw the shares of the ids of a model, by what its counterparts in the delta's vocabulary are, in one panel."""
    counts = {
        model: seeds[0]["vocabulary_map"] for model, seeds in found.items() if seeds and "vocabulary_map" in seeds[0]
    }
    kinds = list(dict.fromkeys(kind for one in counts.values() for kind in one))

    def draw(panel: Axes, _: str) -> None:
        width = 0.8 / len(counts)
        for place, (model, one) in enumerate(counts.items()):
            left = [index - 0.4 + (place + 0.5) * width for index in range(len(kinds))]
            shares = [100 * one.get(kind, 0) / max(sum(one.values()), 1) for kind in kinds]
            bars = panel.bar(left, shares, width, color=pick(COLOURS, place), label=model)
            panel.bar_label(bars, fmt="%.1f", fontsize=8)
        dress(panel, "Ids with a counterpart of the delta", "% of ids", "counterpart")
        panel.set_xticks(range(len(kinds)), kinds)

    return draw_panels(["vocabulary_map"] if counts else [], draw, path)


def _bucket(key: str) -> str:
    low, high = key.removeprefix("rouge_l_").split("_")
    return f"{low} and more" if high == "up" else f"{low} to {high}"


def _curve(one: Mapping[str, Any], analysis: str, name: str) -> Mapping[str, list] | None:
    return one.get("curves", {}).get(analysis, {}).get(name)


def _sets(found: Found, analysis: str) -> list[str]:
    return list(
        dict.fromkeys(
            name for seeds in found.values() for one in seeds for name in one.get("curves", {}).get(analysis, {})
        )
    )


def _keys(found: Found) -> list[str]:
    keys = dict.fromkeys(key for seeds in found.values() for one in seeds for key in one["mean"])
    return [key for key in keys if find_metric(key) is not None]


PICTURES: dict[str, Callable[[Found, Path], bool]] = {
    "exposure-bias": draw_exposure_bias,
    "calibration": draw_calibration,
    "diversity": draw_diversity,
    "length-buckets": draw_length_buckets,
    "vocabulary-map": draw_vocabulary_map,
}
