"""From raw measurements to a CSV file, plots and one page of Markdown."""

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path

from minillm.benchmarks.cases import Case
from minillm.benchmarks.machine import as_table
from minillm.benchmarks.measure import MODES

ERRORS = ("loss_error", "hidden_grad_error", "weight_grad_error")
COLUMNS = (
    *("kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit"),
    *("x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80"),
    *("extra_benchmark_config_str", "gpu_name", "timestamp", "version"),
)


@dataclass
class Row:
    """One provider on one case in one mode."""

    case: Case
    provider: str
    mode: str
    milliseconds: tuple[float, float, float]  # median, 20th and 80th percentile
    peak_bytes: float | None  # over the inputs; the median of the repeats
    errors: dict[str, float]
    tflops: float  # of the least matrix products, over the median time
    ratio: float | None  # the median time over that of the bare matrix products
    samples: int


def summarise(cases: list[Case], results: list[dict], yardstick: str) -> tuple[list[Row], dict[str, dict[str, str]]]:
    """The rows, fastest first in each case and mode, and {provider: {case: why it did not run}}."""
    skipped: dict[str, dict[str, str]] = {}
    for result in results:
        if "skipped" in result:
            skipped.setdefault(result["provider"], {}).setdefault(result["case"], result["skipped"])
    rows = []
    for case in cases:
        for mode in MODES:
            here = [r for r in results if r["case"] == case.name and r["mode"] == mode]
            group = [
                _row(case, mode, provider, [r for r in here if r["provider"] == provider])
                for provider in dict.fromkeys(r["provider"] for r in here)
            ]
            floor = next((row.milliseconds[0] for row in group if row.provider == yardstick), None)
            for row in group:
                row.ratio = None if floor is None else row.milliseconds[0] / floor
            rows += sorted(group, key=lambda row: row.milliseconds[0])
    return rows, skipped


def _row(case: Case, mode: str, provider: str, results: list[dict]) -> Row:
    times = sorted(sample for result in results for sample in result["milliseconds"])
    peaks = [result["peak_bytes"] for result in results if result["peak_bytes"] is not None]
    errors = {name: result[name] for result in results for name in ERRORS if name in result}
    median = statistics.median(times)
    return Row(
        case,
        provider,
        mode,
        (median, quantile(times, 0.2), quantile(times, 0.8)),
        statistics.median(peaks) if peaks else None,
        errors,
        case.flops(mode) / median / 1e9,
        None,
        len(times),
    )


def quantile(ascending: list[float], share: float) -> float:
    """Linear between the samples around it."""
    place = share * (len(ascending) - 1)
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return ascending[low] + (place - low) * (ascending[high] - ascending[low])


def write_csv(path: Path, rows: list[Row], machine: dict[str, str]) -> None:
    """Liger's columns, a line a metric, so that tables of both can be joined."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for row in rows:
            metrics = [("speed", "ms", *row.milliseconds)]
            if row.peak_bytes is not None:
                metrics.append(("memory", "MB", *[row.peak_bytes / 2**20] * 3))
            metrics.append(("tflops", "TFLOP/s", *[row.tflops] * 3))
            if row.ratio is not None:
                metrics.append(("ratio_to_matmuls", "1", *[row.ratio] * 3))
            metrics += [(name, "1", *[value] * 3) for name, value in row.errors.items()]
            for metric, unit, *values in metrics:
                table.writerow(
                    [f"fused_linear_{row.case.loss}", row.provider, row.mode, metric, unit, "BT", "B x T"]
                    + [row.case.tokens, *values, row.case.as_dict(), machine["device"], machine["date"]]
                    + [machine["minillm"]]
                )


def write_plots(folder: Path, rows: list[Row]) -> list[Path]:
    """Time against memory for each case; time over tokens where a shape has several. None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for case in dict.fromkeys(row.case for row in rows):
        here = [row for row in rows if row.case == case and row.mode == "full"]
        if not here:
            continue
        figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.35 * len(here) + 1.6), sharey=True)
        names = [row.provider for row in here]
        colours = ["tab:blue" if name.startswith("minillm") else "tab:gray" for name in names]
        low = [row.milliseconds[0] - row.milliseconds[1] for row in here]
        high = [row.milliseconds[2] - row.milliseconds[0] for row in here]
        axes[0].barh(names, [row.milliseconds[0] for row in here], xerr=[low, high], color=colours)
        axes[0].set_xlabel("forward and backward, ms (median, 20th to 80th percentile)")
        axes[1].barh(names, [(row.peak_bytes or 0) / 2**20 for row in here], color=colours)
        axes[1].set_xlabel("peak memory over the inputs, MiB")
        axes[0].invert_yaxis()
        figure.suptitle(case.name)
        paths.append(_save(figure, folder / f"{case.name}.png"))
        pyplot.close(figure)
    families: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.mode == "full":
            case = row.case
            key = case.loss, case.student_hidden, case.teacher_hidden, case.vocab, case.ignored, f"top{case.top_k}"
            families.setdefault(key, []).append(row)
    for key, group in families.items():
        if len({row.case.tokens for row in group}) < 2:
            continue
        figure, axis = pyplot.subplots(figsize=(7, 5))
        for provider in dict.fromkeys(row.provider for row in group):
            line = sorted((row.case.tokens, row.milliseconds[0]) for row in group if row.provider == provider)
            style = "k--" if provider == "matmuls" else "o-"
            axis.plot(*zip(*line, strict=True), style, label=provider)
        axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel="forward and backward, ms")
        axis.legend(fontsize=7)
        paths.append(_save(figure, folder / ("-".join(map(str, key)) + "-over-tokens.png")))
        pyplot.close(figure)
    return paths


def _save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    return path


def write_markdown(
    path: Path,
    rows: list[Row],
    skipped: dict[str, dict[str, str]],
    machine: dict[str, str],
    settings: dict[str, object],
    plots: list[Path],
    verdicts: str = "",
) -> str:
    """One page: verdicts, the tables, who did not run and why, and what it was measured on. Returns the first two."""
    tables = []
    for case in dict.fromkeys(row.case for row in rows):
        tables.append(f"## {case.name}\n")
        tables.append("| provider | mode | ms (p20 - p80) | x matmuls | TFLOP/s | MiB | loss | dX | dW |")
        tables.append("|---|---|--:|--:|--:|--:|--:|--:|--:|")
        for row in (row for row in rows if row.case == case):
            median, low, high = row.milliseconds
            cells = [
                row.provider,
                row.mode,
                f"{median:.4g} ({low:.4g} - {high:.4g})",
                "" if row.ratio is None else f"{row.ratio:.2f}",
                f"{row.tflops:.3g}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}",
                *(f"{row.errors[name]:.1e}" if name in row.errors else "" for name in ERRORS),
            ]
            tables.append("| " + " | ".join(cells) + " |")
        tables.append("")
    table = "\n".join([verdicts, *tables] if verdicts else tables)
    lines = ["# Fused losses", "", table, "## Not run", ""]
    for provider, cases in sorted(skipped.items()):
        lines.append(f"- {provider}: {'; '.join(sorted(set(cases.values())))}")
    lines += ["", "## How", ""]
    lines += [
        "A process for each provider and repeat, in random order. `full` is forward and backward, `forward` runs under "
        "no_grad. MiB: the peak over the inputs (device allocations, or the resident set of a CPU process). TFLOP/s "
        "counts the least matrix products (three of the student and one of the teacher; one each for `forward`) of "
        "the kept tokens. `x matmuls`: the time over that of those products alone, in the same run. loss, dX, dW: "
        "relative error (gradients: L2) from float64 on the same inputs. `eager` keeps logits in the model's dtype "
        "and computes in fp32; providers that do not drop ignored tokens get the kept ones. Diffuse random logits "
        "deny filtering kernels their filter.",
        "",
        *as_table({**machine, **settings}),
        "",
    ]
    lines += [f"![{plot.stem}]({plot.name})" for plot in plots]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table
