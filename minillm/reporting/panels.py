"""Several panels in one picture, a panel a key."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minillm.reporting.curves import DPI, PANEL_HEIGHT, PANEL_WIDTH


def draw_panels(
    keys: Sequence[str],
    draw: Callable[[Axes, str], None],
    path: Path,
    *,
    height: float = PANEL_HEIGHT,
    legend: bool = True,
) -> bool:
    """A PNG with a panel a key, each drawn by `draw`; no file, and False, where there are no keys."""
    if not keys:
        path.unlink(missing_ok=True)
        return False
    columns = min(3, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(columns * PANEL_WIDTH, rows * height + 0.6), dpi=DPI, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel, key in zip(panels, keys, strict=False):
        draw(panel, key)
    for panel in panels[len(keys) :]:
        panel.set_axis_off()
    if legend:
        labelled = dict(
            (label, handle)
            for panel in panels
            for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
        )
        figure.legend(labelled.values(), labelled.keys(), loc="outside upper left", ncols=6, fontsize=9, frameon=False)
    partial = path.with_name(f".{path.name}.partial-file")
    figure.savefig(partial, format="png", facecolor="white")
    partial.replace(path)
    return True
