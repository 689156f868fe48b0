"""The evaluations of a run as tables: every student before, after each stage, and the teacher."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from minillm.evaluate.seeds import over_seeds, summary
from minillm.reporting.markdown import MISSING, duration, table
from minillm.reporting.metric import metrics_in
from minillm.reporting.run_files import Measurement, RunFiles, StageFiles

READING = (
    "Reverse KL is KL(student ‖ teacher) on the student's own samples, forward KL is KL(teacher ‖ student) on the "
    "teacher's, entropy is the student's on its own samples; all over the full vocabulary, at temperature 1."
)


@dataclass(frozen=True)
class Row:
    """One evaluation with the name it has in a table."""

    label: str
    measurement: Measurement
    seconds: float | None = None  # of training


def evaluation_rows(run: RunFiles) -> list[Row]:
    """List the first evaluation of every student, the last one of every stage, and those of the teachers.

    Stages that began with the same measured student share one row, and so do teachers that are one model.
    """
    firsts = [
        (stage.name, stage.evaluations[0])
        for stage in run.stages.values()
        if stage.evaluations and stage.evaluations[0].stage_step == 0
    ]
    befores = [Row(f"before {', '.join(names)}", measurement) for names, measurement in _grouped(firsts)]
    teachers = list(_grouped(run.teachers.items()))
    return [
        *befores,
        *(Row(_label(stage), stage.evaluations[-1], stage.evaluations[-1].seconds) for stage in trained_stages(run)),
        *(
            Row("teacher" if len(teachers) == 1 else f"teacher of {', '.join(names)}", measurement)
            for names, measurement in teachers
        ),
    ]


def trained_stages(run: RunFiles) -> list[StageFiles]:
    """List the stages that were evaluated after some training."""
    return [stage for stage in run.stages.values() if stage.evaluations and stage.evaluations[-1].stage_step > 0]


def seed_rows(runs: Sequence[RunFiles]) -> list[Row]:
    """Average runs that differ in nothing but their seed, one row per student: means, and deviations over the runs.

    Empty where the runs are of different configurations, or have not all been evaluated.
    """
    first = runs[0].stages
    seeds = [tuple(stage.settings.get("seed") for stage in run.stages.values()) for run in runs]
    if len(runs) < 2 or len(set(seeds)) < len(seeds):
        return []
    if any(list(run.stages) != list(first) for run in runs):
        return []
    if any(_seedless(run.stages[name]) != _seedless(stage) for run in runs for name, stage in first.items()):
        return []
    lines = [evaluation_rows(run) for run in runs]
    if any([row.label for row in rows] != [row.label for row in lines[0]] for rows in lines):
        return []
    return [_over_seeds(rows) for rows in zip(*lines, strict=True)]


def _seedless(stage: StageFiles) -> dict:
    return {key: value for key, value in stage.settings.items() if key not in ("seed", "output_dir")}


def _over_seeds(rows: Sequence[Row]) -> Row:
    means = [row.measurement.mean for row in rows]
    found = {metric.key: [mean[metric.key] for mean in means if metric.key in mean] for metric in metrics_in(means)}
    values = summary({key: each for key, each in found.items() if len(each) == len(means)})
    seconds, _ = over_seeds([row.seconds for row in rows if row.seconds is not None])
    return Row(rows[0].label, replace(rows[0].measurement, mean=values, sets={}), seconds)


def metrics_table(rows: Sequence[Row], set_name: str | None = None) -> str:
    """Tabulate the rows' metrics on one set, or their means over the sets with the training time."""
    found = [row.measurement.mean if set_name is None else row.measurement.sets.get(set_name, {}) for row in rows]
    metrics, lines = metrics_in(found), []
    for row, values in zip(rows, found, strict=True):
        seconds = duration(row.seconds) if set_name is None else MISSING
        lines.append([row.label, *(metric.show(values) for metric in metrics), seconds])
    return table(["", *(metric.heading for metric in metrics), "Training time"], lines)


def evaluation_section(run: RunFiles, *, heading: str = "##") -> str:
    """Write the table of means, a line on how to read it, and one table per set where there are several."""
    rows = evaluation_rows(run)
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row.measurement.sets))
    several = len(names) > 1
    deviations = any(key.endswith("_std") for row in rows for key in row.measurement.mean)
    parts = [
        f"{heading} Evaluation",
        f"Means over {', '.join(names)}." if several else f"On {names[0]}." if names else "",
        metrics_table(rows),
        READING + (" ± is the standard deviation over seeds." if deviations else ""),
    ]
    if several:
        parts += [f"{heading}# {name}\n\n{metrics_table(rows, name)}" for name in names]
    return "\n\n".join(part for part in parts if part)


def _label(stage: StageFiles) -> str:
    last = stage.evaluations[-1].stage_step
    return f"{stage.name}, step {last:,}" if last < stage.steps else f"after {stage.name}"


def _grouped(named: Iterable[tuple[str, Measurement]]) -> Iterable[tuple[list[str], Measurement]]:
    groups: list[tuple[list[str], Measurement]] = []
    for name, measurement in named:
        for names, other in groups:
            if other.sets == measurement.sets:
                names.append(name)
                break
        else:
            groups.append(([name], measurement))
    return groups
