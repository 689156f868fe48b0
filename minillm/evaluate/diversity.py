"""Distinct n-grams (Li et al., arXiv 1510.03055): how much of what a model says it says only once."""

from collections.abc import Sequence


def distinct(answers: Sequence[Sequence[int]], size: int) -> float:
    """100 * different n-grams / n-grams, over all answers (token ids) together; NaN where none is so long.

    More text repeats more: compare only sets of the same prompts, and read it beside the length of the answers.
    """
    grams = [tuple(ids[start : start + size]) for ids in answers for start in range(len(ids) - size + 1)]
    return 100.0 * len(set(grams)) / len(grams) if grams else float("nan")
