"""Calibration on a classification set: is a model that gives a label word 80% right in 80% of the cases?

The label words are the only answers compared: their probabilities, each the product over the word's tokens, are
normalised among themselves (MiniLLM, arXiv 2306.08543, section 3.3, table 2).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minillm import UserError

BINS = 10


@dataclass(frozen=True)
class Calibration:
    """The worth of a classifier's confidence."""

    accuracy: float  # per cent
    ece: float  # expected calibration error (Naeini et al., 2015), 0 to 1
    counts: list[int]  # examples a bin of confidence: (0, 0.1], (0.1, 0.2], ...
    confidence: list[float | None]  # mean of a bin, None where it is empty
    correct: list[float | None]  # share of a bin that is right


def calibration(
    logprobs: Tensor,  # (N, C) log-probabilities of the label words, not normalised over them
    labels: Tensor,  # (N,) int64, the right word of each
    *,
    bins: int = BINS,
) -> Calibration:
    """Accuracy of the likeliest word, and sum over bins of n_b / N |accuracy_b - confidence_b|.

    Bins are of equal width over the confidence, the probability of the likeliest word. Raises UserError without any
    example.
    """
    if not len(labels):
        raise UserError("calibration: no examples")
    confidence, chosen = logprobs.double().softmax(-1).max(-1)
    right = (chosen == labels).double()
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = torch.bincount(place, minlength=bins)
    sums = [torch.zeros(bins, dtype=torch.float64).index_add_(0, place, values) for values in (confidence, right)]
    ece = (sums[0] - sums[1]).abs().sum() / len(labels)
    means = [
        [value / count if count else None for value, count in zip(total.tolist(), counts.tolist(), strict=True)]
        for total in sums
    ]
    return Calibration(100.0 * right.mean().item(), ece.item(), counts.tolist(), *means)
