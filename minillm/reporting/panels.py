"""The look of all pictures: colours, markers, and a grid of panels with one legend, which is published complete."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#1f6fb4", "#d1495b", "#2e8b57", "#8a5fbf", "#e08e0b", "#3aa6b9", "#7a5c46", "#c2569b")
MARKERS = "os^DvPXh"
TEACHER, GREY = "#333333", "#777777"
DASHES = ("-", "--", ":", "-.", (0, (3, 1, 1, 1, 1, 1)))
COLUMNS, PANEL_WIDTH, PANEL_HEIGHT, DPI = 3, 4.2, 2.9, 120


def pick(choices: Sequence, place: int):
    """Choose by place; after the last choice comes the first again."""
    return choices[place % len(choices)]


def dress(panel: Axes, title: str, unit: str, along: str) -> None:
    """Give a panel its title, axes and grid."""
    panel.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    panel.set_ylabel(unit, fontsize=9)
    panel.set_xlabel(along, fontsize=9)
    panel.tick_params(labelsize=8.5)
    panel.grid(color="#e4e4e4", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer="steps" in along))


def grid(count: int, *, height: float = PANEL_HEIGHT) -> tuple[Figure, list[Axes]]:
    """Make a figure of `count` panels, `height` inches each, in rows of COLUMNS."""
    columns = min(COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(columns * PANEL_WIDTH, rows * height + 0.6), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    return figure, panels[:count]


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, complete or not at all."""
    partial = path.with_name(f".{path.name}.partial-file")
    figure.savefig(partial, format="png", facecolor="white")
    partial.replace(path)


def draw_panels(
    keys: Sequence[str], draw: Callable[[Axes, str], None], path: Path, *, height: float = PANEL_HEIGHT
) -> bool:
    """Write a PNG with one panel per key, each drawn by `draw`; returns False, and leaves no file, without keys."""
    if not keys:
        path.unlink(missing_ok=True)
        return False
    figure, panels = grid(len(keys), height=height)
    labelled = {}
    for panel, key in zip(panels, keys, strict=True):
        draw(panel, key)
        labelled |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    if labelled:
        figure.legend(labelled.values(), labelled.keys(), loc="outside upper left", ncols=6, fontsize=9, frameon=False)
    save(figure, path)
    return True
