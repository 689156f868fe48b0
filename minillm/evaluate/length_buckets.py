"""Rouge-L by the length of the reference (MiniLLM, arXiv 2306.08543, section 3.3): short references are another task."""

import statistics
from bisect import bisect_left
from collections.abc import Sequence


def bucket_names(edges: Sequence[int]) -> list[str]:
    """`0_5`, `6_10`, `11_up` for the edges 5 and 10."""
    lows = [0, *(edge + 1 for edge in edges)]
    return [f"{low}_{high}" for low, high in zip(lows, [*edges, "up"], strict=True)]


def mean_by_length(
    scores: Sequence[float | None], lengths: Sequence[int], edges: Sequence[int]
) -> dict[str, tuple[float, int]]:
    """{bucket: (mean score, examples)} of the buckets that have any.

    Args:
        scores: one an example, None where it has no reference.
        lengths: tokens of its reference.
        edges: the last length of every bucket but the last, rising.
    """
    buckets: dict[str, list[float]] = {name: [] for name in bucket_names(edges)}
    names = list(buckets)
    for score, length in zip(scores, lengths, strict=True):
        if score is not None:
            buckets[names[bisect_left(edges, length)]].append(score)
    return {name: (statistics.fmean(found), len(found)) for name, found in buckets.items() if found}
