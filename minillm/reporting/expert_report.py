"""The load of a student's experts: which share of the tokens each of them got, layer by layer, and how evenly."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from minillm.reporting.markdown import number, percentage, table
from minillm.reporting.panels import COLOURS, TEACHER, draw_panels, dress
from minillm.reporting.run_files import RunFiles, StageFiles

EXPERTS = "experts.png"
LAST = 10  # records whose mean is the load at the end
END, ENTROPY = "Experts' load at the end", "Entropy of the load"


def expert_section(run: RunFiles) -> str:
    """The report's section on experts, empty for a run without a mixture of experts; its picture is written beside it."""
    loads = {name: load for name, stage in run.stages.items() if (load := load_of(stage)).size}
    drawn = draw_load({name: (run.stages[name], load) for name, load in loads.items()}, run.folder / EXPERTS)
    if not loads:
        return ""
    header = ["stage", "layers with experts", "experts in each", "entropy at first (nats)", "entropy at the end",
              "with equal shares", "smallest share", "largest share"]  # fmt: skip
    rows = []
    for name, load in loads.items():
        entropy, end = entropies(load).mean(-1), load[-LAST:].mean(0)
        rows.append(
            [
                name,
                f"{end.shape[0]}",
                f"{end.shape[1]}",
                number(entropy[0]),
                number(entropy[-LAST:].mean()),
                number(math.log(end.shape[1])),
                percentage(end.min()),
                percentage(end.max()),
            ]
        )
    picture = f"![Load of the experts]({EXPERTS})\n\n" if drawn else ""
    said = (
        f"Of all choices of experts that a layer's router made for the tokens of a step, the share that each expert got; at "
        f"the end is the mean of the last {LAST} records."
    )
    return f"## Experts\n\n{picture}{said}\n\n{table(header, rows)}"


def load_of(stage: StageFiles) -> np.ndarray:  # (records, layers, experts)
    """The shares of a stage's experts in all of its records; of size 0 where its student has none."""
    return np.array([record["expert_load"] for record in stage.train if "expert_load" in record], dtype=float)


def entropies(load: np.ndarray) -> np.ndarray:  # (records, layers, experts) -> (records, layers)
    """The entropy of every layer's shares, in nats."""
    return -(load * np.log(np.where(load > 0, load, 1.0))).sum(-1)


def draw_load(loads: dict[str, tuple[StageFiles, np.ndarray]], path: Path) -> bool:
    """Draw every stage's load at its end, and the entropy on the way there; returns what draw_panels does."""
    keys = {f"{title}: {name}": (title, *of_stage) for name, of_stage in loads.items() for title in (END, ENTROPY)}

    def draw(panel: Axes, key: str) -> None:
        title, stage, load = keys[key]
        if title == END:
            _draw_end(panel, key, load)
        else:
            steps = [record["stage_step"] for record in stage.train if "expert_load" in record]
            _draw_entropy(panel, key, steps, load)

    return draw_panels(list(keys), draw, path)


def _draw_end(panel: Axes, title: str, load: np.ndarray) -> None:
    layers, experts = load.shape[1:]
    image = panel.imshow(
        100 * load[-LAST:].mean(0), aspect="auto", cmap="viridis", vmin=0, interpolation="nearest",
        extent=(-0.5, experts - 0.5, layers + 0.5, 0.5),
    )  # fmt: skip
    panel.figure.colorbar(image, ax=panel, label="% of the layer's choices")
    dress(panel, title, "layers with experts", "experts")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    panel.grid(False)


def _draw_entropy(panel: Axes, title: str, steps: list[int], load: np.ndarray) -> None:
    found = entropies(load)
    for label, values, width in (("mean of layers", found.mean(-1), 1.8), ("least even layer", found.min(-1), 1.0)):
        panel.plot(
            steps, values, color=COLOURS[0], linewidth=width, label=label, marker="o" if len(load) == 1 else None
        )
    panel.axhline(math.log(load.shape[-1]), color=TEACHER, linestyle=(0, (5, 3)), linewidth=1.1, label="equal shares")
    dress(panel, title, "nats", "steps of the stage")
    panel.set_ylim(bottom=0)
