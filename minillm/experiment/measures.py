"""The measures of an experiment's table: metrics of an evaluation, and the costs of training."""

from minillm.config.evaluation import EvalConfig
from minillm.evaluate.length_buckets import bucket_names
from minillm.reporting.metric import METRICS, Metric, find_metric

COSTS = (
    Metric("train_seconds", "Training time", "s", 0),
    Metric("student_tokens", "Trained on", "student tokens", 0),
    Metric("tokens_per_second", "Training speed", "student tokens/s", 1),
    Metric("steps", "Trained for", "steps", 0),
)


def known_measures(evaluation: EvalConfig) -> dict[str, list[str]]:
    """List every measure that an evaluation of this configuration gives, with the sets that have it."""
    usual = [metric.key for metric in METRICS]
    usual += [f"distinct_{size}" for size in evaluation.distinct]
    usual += ["loss_bits_per_byte"] * evaluation.bits_per_byte
    if evaluation.label_accuracy is not None:
        usual += ["label_accuracy", "unlabelled_share"]
    if evaluation.length_buckets:
        usual += [f"rouge_l_{bucket}" for bucket in bucket_names(evaluation.length_buckets)]
    if evaluation.exposure_bias is not None:
        usual += [f"excess_error_{length}" for length in evaluation.exposure_bias.lengths]
    of_pairs = list(evaluation.held_out_pairs)
    if evaluation.preference is not None and evaluation.preference.sampled:
        of_pairs += evaluation.sets
    compared = ["margin_nats", "preferred_share"] if of_pairs else []
    of_labels = ["accuracy", "ece"] if evaluation.calibration else []
    return {
        **{key: list(evaluation.sets) for key in usual},
        **{key: list(evaluation.calibration) for key in of_labels},
        **{key: of_pairs for key in compared},
        **{metric.key: [] for metric in COSTS},
    }


def metric_of(measure: str) -> Metric:
    """Find the name, unit and direction of a measure, METRIC or METRIC@SET."""
    key, _, set_name = measure.partition("@")
    metric = find_metric(key) or next(metric for metric in COSTS if metric.key == key)
    return Metric(metric.key, f"{set_name}: {metric.title}", metric.unit, metric.better) if set_name else metric
