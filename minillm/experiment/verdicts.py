"""Verdicts on claims, seed by seed: arms that started from the same seed are compared with each other."""

from dataclasses import dataclass

from minillm.evaluate.seeds import over_seeds
from minillm.experiment.config import Claim
from minillm.experiment.experiment_file import TEACHER
from minillm.experiment.results import Results

HOLDS, FAILS, MIXED, OPEN = "holds", "does not hold", "undecided", "not measured"
WORDS = {"below": "below", "above": "above", "at_most": "at most", "at_least": "at least"}


@dataclass(frozen=True)
class Verdict:
    """The verdict on one claim."""

    claim: Claim
    word: str  # HOLDS: for every seed; FAILS: for none; MIXED: for some; OPEN: no seed has both values
    holds: int  # seeds for which it holds
    seeds: int  # seeds that have both values
    left: float | None  # means over these seeds
    right: float | None
    difference: float | None  # mean of arm - than, over the seeds
    deviation: float | None  # of the difference; None for one seed


def judge(claim: Claim, results: Results) -> Verdict:
    """Compare the two arms of a claim on every seed that has both.

    This is no test of significance: of as few seeds as experiments have, one can say whether all of them agree.
    """
    pairs = results.pairs(claim.arm, claim.than, claim.measure).values()
    if not pairs:
        return Verdict(claim, OPEN, 0, 0, None, None, None, None)
    holds = sum(_holds(claim, left, right) for left, right in pairs)
    word = HOLDS if holds == len(pairs) else FAILS if holds == 0 else MIXED
    difference, deviation = over_seeds([left - right for left, right in pairs])
    means = (over_seeds(values)[0] for values in zip(*pairs, strict=True))
    return Verdict(claim, word, holds, len(pairs), *means, difference, deviation)


def _holds(claim: Claim, left: float, right: float) -> bool:
    """True where one pair of values agrees with the claim, whose margin helps at_most and at_least; a NaN never does."""
    slack = claim.margin * abs(right)
    return {
        "below": left < right - slack,
        "above": left > right + slack,
        "at_most": left <= right + slack,
        "at_least": left >= right - slack,
    }[claim.relation]


def name_of(arm: str) -> str:
    """Name an arm as a sentence does."""
    return "the teacher" if arm == TEACHER else arm
