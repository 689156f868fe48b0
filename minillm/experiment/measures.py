"""What can stand in an experiment's table: the metrics of an evaluation, and what the training took."""

from minillm.config.evaluation import EvalConfig
from minillm.reporting.metric import METRICS, Metric

COSTS = (
    Metric("train_seconds", "Training time", "s", 0),
    Metric("student_tokens", "Student tokens", "tokens", 0),
    Metric("steps", "Steps", "steps", 0),
)


def known_measures(evaluation: EvalConfig) -> dict[str, list[str]]:
    """Every measure that an evaluation of this configuration gives, with the sets beside eval.sets that have it."""
    return {metric.key: [] for metric in (*METRICS, *COSTS)}


def metric_of(measure: str) -> Metric:
    """How a measure is called, in which unit, and which way is better."""
    key, _, set_name = measure.partition("@")
    metric = next(metric for metric in (*METRICS, *COSTS) if metric.key == key)
    if not set_name:
        return metric
    return Metric(metric.key, f"{set_name}: {metric.title}", metric.unit, metric.better)
