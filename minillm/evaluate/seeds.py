"""Measurements that were taken once a seed, as a mean and a deviation: the seeds of an evaluation, and those of whole runs."""

import math
import statistics
from collections.abc import Collection, Mapping


def over_seeds(values: Collection[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation.

    None for the mean of nothing, and for a deviation of fewer than two values or of some that are not finite.
    """
    if not values:
        return None, None
    spread = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.fmean(values), statistics.stdev(values) if spread else None


def summary(measured: Mapping[str, Collection[float]]) -> dict[str, float]:
    """metric -> mean, and metric_std -> deviation where there is one."""
    found = {}
    for metric, values in measured.items():
        mean, deviation = over_seeds(values)
        found |= {key: one for key, one in ((metric, mean), (f"{metric}_std", deviation)) if one is not None}
    return found
