"""Findings in a run's measurements: a collapse, and a verdict on two stages of the same training time."""

import math

from minillm.reporting.markdown import duration, number, with_deviation
from minillm.reporting.metric import Metric, metrics_in
from minillm.reporting.run_files import Measurement, RunFiles, StageFiles

# Collapse: reverse KL falls while the forward KL rises by a tenth and less than half of the entropy is left.
ENTROPY_LEFT, FORWARD_KL_RISE = 0.5, 1.1


def collapses(run: RunFiles) -> list[str]:
    """Write a paragraph on every stage whose student collapsed onto few answers."""
    found = []
    for stage in run.stages.values():
        before = run.before(stage)
        if before is None or not stage.evaluations or stage.evaluations[-1] is before:
            continue
        start, end = before.mean, stage.evaluations[-1].mean
        if not {"reverse_kl_nats", "forward_kl_nats", "entropy_nats"} <= start.keys() & end.keys():
            continue
        if (
            end["reverse_kl_nats"] < start["reverse_kl_nats"]
            and end["entropy_nats"] < ENTROPY_LEFT * start["entropy_nats"]
            and end["forward_kl_nats"] > FORWARD_KL_RISE * start["forward_kl_nats"]
        ):
            found.append(
                f"**Warning: {stage.name} looks collapsed.** Its reverse KL fell from "
                f"{_change(start, end, 'reverse_kl_nats')} nats a token, but the entropy fell from "
                f"{_change(start, end, 'entropy_nats')} and the forward KL rose from "
                f"{_change(start, end, 'forward_kl_nats')}: the student gives few answers that the teacher finds "
                "likely, and no longer covers what else the teacher would say. Read the samples below; a lower "
                "learning rate, fewer inner epochs or more weight on the pre-training loss may help."
            )
    return found


def _change(start: dict[str, float], end: dict[str, float], metric: str) -> str:
    return f"{number(start[metric])} to {number(end[metric])}"


def verdicts(run: RunFiles) -> list[str]:
    """Write a paragraph on every stage that was given another's training time and started from the same student."""
    return [
        _verdict(stage, other)
        for stage in run.stages.values()
        if (other := run.stages.get(stage.timed_by or "")) is not None
        and stage.settings.get("student") == other.settings.get("student")
        and stage.evaluations
        and other.evaluations
        and stage.evaluations[-1].stage_step == stage.steps
        and other.evaluations[-1].stage_step == other.steps
    ]


def _verdict(timed: StageFiles, model: StageFiles) -> str:
    # the stage that set the time is named first: the other one was made to be compared with it
    first, second = model.evaluations[-1], timed.evaluations[-1]
    sentences = [
        f"**{model.name} against {timed.name}, from the same student with the same training time** "
        f"({_effort(model)}; {_effort(timed)})."
    ]
    both = {key: value for key, value in first.mean.items() if key in second.mean}
    compared = [metric for metric in metrics_in([both]) if metric.better]
    ahead: dict[str, list[str]] = {model.name: [], timed.name: []}
    level = []
    for metric in compared:
        gain = metric.better * (first.mean[metric.key] - second.mean[metric.key])
        if abs(gain) <= _chance(metric, first, second):
            level.append(metric.title)
        else:
            ahead[model.name if gain > 0 else timed.name].append(metric.title)
    sentences += [f"{name} is ahead in {_listed(titles)}." for name, titles in ahead.items() if titles]
    if level:
        sentences.append(f"They are level in {_listed(level)}.")
    clauses = [_clause(metric, first, second) for metric in compared]
    if clauses:
        sentences.append(f"{model.name} to {timed.name}: {'; '.join(clauses)}.")
    if not any(name.endswith("_std") for name in first.mean):
        sentences.append("One evaluation seed: small differences may be chance.")
    elif level:
        sentences.append("Level means a difference no larger than its standard deviation over the evaluation seeds.")
    return " ".join(sentences)


def _chance(metric: Metric, first: Measurement, second: Measurement) -> float:
    """The deviation of the difference over seeds; 0 where there was one seed."""
    return math.hypot(*(one.mean.get(f"{metric.key}_std", 0.0) for one in (first, second)))


def _effort(stage: StageFiles) -> str:
    return f"{stage.name}: {duration(stage.seconds)}, {stage.steps:,} steps, {stage.tokens:,} student tokens"


def _clause(metric: Metric, first: Measurement, second: Measurement) -> str:
    left, right = first.mean[metric.key], second.mean[metric.key]
    values = " to ".join(
        with_deviation(measurement.mean[metric.key], measurement.mean.get(f"{metric.key}_std"))
        for measurement in (first, second)
    )
    if metric.better > 0:
        return f"{metric.title} {values} ({left - right:+.2f})"
    ratio = f" (ratio {number(left / right)})" if right > 0 else ""
    return f"{metric.title} {values} {metric.unit}{ratio}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
