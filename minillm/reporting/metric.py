"""How every metric of an evaluation is called, and which way is better."""

from collections.abc import Mapping
from dataclasses import dataclass

from minillm.reporting.markdown import share, with_deviation


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
        """What a recorded value is multiplied by to be in `unit`."""
        return 100.0 if self.key.endswith("_share") else 1.0

    def show(self, values: Mapping[str, float]) -> str:
        """The value as a table has it, with its deviation over the seeds where there is one."""
        value, deviation = values.get(self.key), values.get(f"{self.key}_std")
        return share(value) if self.key.endswith("_share") else with_deviation(value, deviation)


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
