"""Names, units and directions of all metrics of an evaluation."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from minillm.reporting.markdown import percentage, with_deviation


@dataclass(frozen=True)
class Metric:
    """One metric of minillm.evaluate.evaluator."""

    key: str
    title: str
    unit: str
    better: int  # +1 higher, -1 lower, 0 neither

    @property
    def heading(self) -> str:
        return f"{self.title} ({self.unit}){ {1: ' ↑', -1: ' ↓', 0: ''}[self.better] }"

    @property
    def scale(self) -> float:
        """The factor from a recorded value to one in `unit`."""
        return 100.0 if self.key.endswith("_share") else 1.0

    def show(self, values: Mapping[str, float]) -> str:
        """Write the value as a table has it, with its deviation over the seeds where there is one."""
        value, deviation = values.get(self.key), values.get(f"{self.key}_std")
        return percentage(value) if self.key.endswith("_share") else with_deviation(value, deviation)


METRICS = (
    Metric("reverse_kl_nats", "Reverse KL", "nats/token", -1),
    Metric("sequence_reverse_kl_nats", "Sequence reverse KL", "nats/answer", -1),
    Metric("forward_kl_nats", "Forward KL", "nats/token", -1),
    Metric("entropy_nats", "Entropy", "nats/token", 0),
    Metric("rouge_l", "Rouge-L", "F1 × 100", +1),
    Metric("exact_match", "Exact match", "%", +1),
    Metric("loss_nats", "Loss on references", "nats/token", -1),
    Metric("length_tokens", "Answer length", "tokens", 0),
    Metric("ended_share", "Answers that end", "%", 0),
)

# those that are measured where they are asked for; some hold a number: (pattern of the key, title, unit, better)
_ASKED_FOR = (
    (r"rouge_l_(\d+)_up", "Rouge-L, references from {} tokens", "F1 × 100", +1),
    (r"rouge_l_(\d+)_(\d+)", "Rouge-L, references of {} to {} tokens", "F1 × 100", +1),
    (r"distinct_(\d+)", "Distinct {}-grams", "%", 0),
    (r"loss_bits_per_byte", "Loss on references", "bits/byte", -1),
    (r"excess_error_(\d+)", "Excess error at {} tokens", "%", -1),
    (r"label_accuracy", "Label accuracy", "%", +1),
    (r"unlabelled_share", "Answers without a label", "%", -1),
    (r"accuracy", "Accuracy on label words", "%", +1),
    (r"margin_nats", "Margin of the preferred answer", "nats", +1),
    (r"preferred_share", "Pairs in their order", "%", +1),
    (r"ece", "Expected calibration error", "0 to 1", -1),
)


def find_metric(key: str) -> Metric | None:
    """Find the metric of a key, None where the key is none of a metric (that of a deviation, for one)."""
    for metric in METRICS:
        if metric.key == key:
            return metric
    for pattern, title, unit, better in _ASKED_FOR:
        match = re.fullmatch(pattern, key)
        if match:
            return Metric(key, title.format(*match.groups()), unit, better)
    return None


def metrics_in(means: Iterable[Mapping[str, float]]) -> list[Metric]:
    """List every metric that some evaluation has: the usual ones in their order, then the others as they come."""
    keys = dict.fromkeys(key for mean in means for key in mean)
    usual = [metric for metric in METRICS if metric.key in keys]
    others = [find_metric(key) for key in keys if all(metric.key != key for metric in usual)]
    return [*usual, *(metric for metric in others if metric is not None)]
