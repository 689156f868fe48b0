"""The results in an experiment's folders: a number for every arm, seed and measure that is there."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.experiment.experiment_file import TEACHER, Experiment
from minillm.experiment.jobs import FINAL, folder_of, is_seedless
from minillm.experiment.measures import COSTS
from minillm.experiment.measuring import TEACHERS, read_evaluation
from minillm.storage.metrics_log import METRICS, read_numbers, read_records

FAILURE = "failure.txt"


@dataclass(frozen=True)
class Result:
    """One arm with one seed, or a teacher."""

    mean: dict[str, float]  # over the sets, and the costs of training
    sets: dict[str, dict[str, float]]
    source: str = ""  # the folder of its evaluation
    samples: list[dict[str, Any]] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)  # evaluation.json
    evaluations: list[dict[str, Any]] = field(default_factory=list)  # while training

    def value(self, measure: str) -> float | None:
        """Return the value of METRIC or METRIC@SET, None where it was not measured."""
        metric, _, set_name = measure.partition("@")
        return (self.sets.get(set_name, {}) if set_name else self.mean).get(metric)


@dataclass(frozen=True)
class Results:
    """All results of an experiment."""

    arms: dict[str, dict[int, Result]]  # arm -> seed -> result
    teachers: dict[str, dict[int, Result]]  # arm -> seed -> the result of its teacher
    shared: dict[str, dict[int, Result]]  # stages before the arms: no evaluation, the costs of training
    failures: dict[tuple[str, int], str]
    seedless: frozenset[str] = frozenset()  # arms that are measured once

    def pairs(self, arm: str, than: str, measure: str) -> dict[int, tuple[float, float]]:
        """Return seed -> the values of two arms, where both are there. An arm that is measured once counts for every seed."""
        left, right = self.values(arm, measure, other=than), self.values(than, measure, other=arm)
        if arm in self.seedless and left and than not in self.seedless:
            left = dict.fromkeys(right, next(iter(left.values())))
        if than in self.seedless and right and arm not in self.seedless:
            right = dict.fromkeys(left, next(iter(right.values())))
        return {seed: (left[seed], right[seed]) for seed in sorted(left.keys() & right.keys())}

    def values(self, arm: str, measure: str, *, other: str | None = None) -> dict[int, float]:
        """Return seed -> the value of an arm; of `teacher`, the values of the teacher of `other`."""
        results = self.teachers.get(other or "", {}) if arm == TEACHER else self.arms.get(arm, {})
        found = {seed: result.value(measure) for seed, result in results.items()}
        return {seed: value for seed, value in found.items() if value is not None}


def read_results(experiment: Experiment, output: Path, seeds: list[int]) -> Results:
    """Read the results of the arms with these seeds.

    Raises UserError where a file cannot be read.
    """
    arms, teachers, shared, failures = {}, {}, {}, {}
    for name in [*experiment.shared, *experiment.arms]:
        for seed in seeds:
            folder = folder_of(output, seed, name)
            if (folder / FAILURE).is_file():
                failures[name, seed] = (folder / FAILURE).read_text(encoding="utf-8").strip()
            records = read_records(folder / METRICS)
            costs = _costs(records) if (folder / FINAL).is_dir() else {}
            if name in experiment.shared:
                if costs:
                    shared.setdefault(name, {})[seed] = Result(costs, {})
                continue
            found = read_evaluation(folder)
            if found is None:
                continue
            arms.setdefault(name, {})[seed] = _result(folder, found, costs, records)
            if found.get("teacher"):
                place = output / TEACHERS / found["teacher"]
                beside = read_evaluation(place)
                if beside is not None:
                    teachers.setdefault(name, {})[seed] = _result(place, beside, {}, [])
    seedless = frozenset(name for name in experiment.arms if is_seedless(experiment, name))
    return Results(arms, teachers, shared, failures, seedless)


def _result(folder: Path, found: dict[str, Any], costs: dict[str, float], records: list[dict]) -> Result:
    sets = {name: read_numbers(metrics) for name, metrics in found["sets"].items()}
    evaluations = [record for record in records if record["kind"] == "eval" and record["who"] == "student"]
    return Result({**read_numbers(found["mean"]), **costs}, sets, str(folder), found["samples"], found, evaluations)


def _costs(records: list[dict]) -> dict[str, float]:
    trained = [record for record in records if record["kind"] == "train"]
    if not trained:
        return {}
    last = trained[-1]
    values = {"train_seconds": last["seconds"], "student_tokens": last["student_tokens"], "steps": last["stage_step"]}
    if last["seconds"]:
        values["tokens_per_second"] = last["student_tokens"] / last["seconds"]
    return {metric.key: values[metric.key] for metric in COSTS if metric.key in values}
