"""The evaluations of a run as tables: every student before, after each stage, and the teacher."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from minillm.reporting.markdown import MISSING, duration, table
from minillm.reporting.metric import METRICS
from minillm.reporting.run_files import Measurement, RunFiles, StageFiles

READING = (
    "Reverse KL is KL(student ‖ teacher) on the student's own samples, forward KL is KL(teacher ‖ student) on the "
    "teacher's, entropy is the student's on its own samples; all over the whole vocabulary, at temperature 1."
)


@dataclass(frozen=True)
class Row:
    """One evaluation with the name it has in a table."""

    label: str
    measurement: Measurement
    seconds: float | None = None  # of training


def evaluation_rows(run: RunFiles) -> list[Row]:
    """The first evaluation of every student, the last one of every stage, and those of the teachers.

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
    """The stages that were evaluated after some training."""
    return [stage for stage in run.stages.values() if stage.evaluations and stage.evaluations[-1].stage_step > 0]


def metrics_table(rows: Sequence[Row], set_name: str | None = None) -> str:
    """The rows' metrics on one set, or their means over the sets with the training time."""
    lines = []
    for row in rows:
        values = row.measurement.mean if set_name is None else row.measurement.sets.get(set_name, {})
        seconds = duration(row.seconds) if set_name is None else MISSING
        lines.append([row.label, *(metric.show(values) for metric in METRICS), seconds])
    return table(["", *(metric.heading for metric in METRICS), "Training time"], lines)


def evaluation_section(run: RunFiles, *, heading: str = "##") -> str:
    """The table of means, how to read it, and a table a set where there are several."""
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
