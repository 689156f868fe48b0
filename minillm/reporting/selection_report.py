"""The choice that stages have made of a corpus: the scores of the documents that were kept and dropped, their lengths, where they
come from, and some of either kind."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from minillm import UserError
from minillm.data.selection import SELECTION
from minillm.reporting.markdown import cell, number, percentage, table
from minillm.reporting.panels import COLOURS, GREY, draw_panels, dress

KINDS = {"kept": COLOURS[0], "dropped": GREY}
PANELS = {
    "score": ("Documents by score", "nats/token, teacher over reference"),
    "tokens": ("Documents by length", "tokens"),
}
SHOWN_SOURCES = 20


def selection_sections(folder: Path) -> list[str]:
    """The sections of a run's report on its stages that chose documents; their pictures are written beside it.

    Raises UserError where the file of a stage cannot be read.
    """
    return [_section(path.parent.name, _read(path), folder) for path in sorted(folder.glob(f"stages/*/{SELECTION}"))]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _section(stage: str, found: Mapping[str, Any], folder: Path) -> str:
    picture = f"selection-{stage}.png"
    draw_selection(found, folder / picture)
    groups = found["groups"]
    told = (
        f"{groups['kept']['documents']:,} of {found['documents']:,} documents were kept, those with the highest scores "
        f"(ratio {found['ratio']:g}); the lowest of these is {number(found['lowest_kept'])} nats/token."
    )
    if found["without_prediction"]:
        told += f" {found['without_prediction']:,} have no token to be scored by, and are neither kept nor counted."
    rows = [
        [
            kind,
            f"{group['documents']:,}",
            f"{group['repeats']:,}",
            f"{group['tokens']:,}",
            number(group["median_tokens"]),
            number(group["score"]),
            number(group["teacher_nll"]),
            number(group["reference_nll"]),
        ]
        for kind, group in groups.items()
    ]
    header = [
        "",
        "documents",
        "repeats of earlier ones",
        "tokens",
        "median tokens",
        "mean score",
        "teacher's NLL",
        "reference's NLL",
    ]
    parts = [
        f"## Documents chosen by stage {stage}",
        f"![Scores and lengths of the documents]({picture})",
        told,
        table(header, rows),
        _sources(found["sources"]),
        *(_samples(kind, found["samples"][kind]) for kind in KINDS),
    ]
    return "\n\n".join(part for part in parts if part)


def _sources(sources: list[dict[str, Any]]) -> str:
    """The largest sources, where there are several."""
    if len(sources) < 2:
        return ""
    largest = sorted(sources, key=lambda one: -one["documents"])[:SHOWN_SOURCES]
    rows = [
        [
            cell(one["source"], limit=100),
            f"{one['documents']:,}",
            percentage(one["kept"] / one["documents"]),
            f"{one['tokens']:,}",
            percentage(one["kept_tokens"] / one["tokens"] if one["tokens"] else None),
        ]
        for one in largest
    ]
    beyond = (
        f"\n\n{len(sources) - len(largest):,} smaller sources are not shown." if len(sources) > len(largest) else ""
    )
    return table(["source", "documents", "kept", "tokens", "of these kept"], rows) + beyond


def _samples(kind: str, samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    rows = [[number(one["score"]), f"{one['tokens']:,}", cell(one["text"], limit=300)] for one in samples]
    return f"### {kind.capitalize()}\n\n{table(['score', 'tokens', 'text'], rows, numbers=False)}"


def draw_selection(found: Mapping[str, Any], path: Path) -> None:
    """Write the histograms of scores and lengths, the kept documents in one colour and the dropped in another."""

    def draw(panel: Axes, key: str) -> None:
        histogram, (title, along) = found["histograms"][key], PANELS[key]
        edges, below = np.array(histogram["edges"]), np.zeros(len(histogram["edges"]) - 1)
        for kind, colour in KINDS.items():
            counts = np.array(histogram[kind])
            panel.bar(edges[:-1], counts, np.diff(edges), below, align="edge", color=colour, label=kind)
            below += counts
        dress(panel, title, "documents", along)

    draw_panels(list(PANELS), draw, path)
