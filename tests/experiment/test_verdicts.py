"""Verdicts on made-up numbers."""

import math
from dataclasses import replace

import pytest

from minillm.experiment.config import Claim
from minillm.experiment.results import Result, Results
from minillm.experiment.verdicts import FAILS, HOLDS, MIXED, OPEN, judge


def results(**arms: dict[int, float]) -> Results:
    teacher = arms.pop("teacher", {})
    by_arm = {arm: {seed: Result({"x": value}, {}) for seed, value in seeds.items()} for arm, seeds in arms.items()}
    beside = {arm: {seed: Result({"x": value}, {}) for seed, value in teacher.items()} for arm in by_arm}
    return Results(by_arm, beside if teacher else {}, {}, {})


def claim(relation: str, margin: float = 0.0, than: str = "b") -> Claim:
    return Claim(says="a is so", arm="a", measure="x", relation=relation, than=than, margin=margin)


@pytest.mark.parametrize(
    ("relation", "a", "b", "margin", "word"),
    [
        ("below", [1, 2], [2, 3], 0.0, HOLDS),
        ("below", [1, 3], [2, 3], 0.0, MIXED),
        ("below", [2, 3], [2, 3], 0.0, FAILS),
        ("below", [1.5, 1.5], [2, 2], 0.2, HOLDS),
        ("below", [1.7, 1.7], [2, 2], 0.2, FAILS),
        ("above", [2.5, 2.5], [2, 2], 0.2, HOLDS),
        ("above", [2.3, 2.5], [2, 2], 0.2, MIXED),
        ("at_most", [2.1, 2], [2, 2], 0.1, HOLDS),
        ("at_least", [1.9, 1.7], [2, 2], 0.1, MIXED),
        ("at_least", [math.nan, math.nan], [2, 2], 0.1, FAILS),
        ("above", [-0.5, -0.5], [-1, -1], 0.2, HOLDS),
    ],
)
def test_a_claim_holds_if_it_does_for_every_seed(relation, a, b, margin, word):
    verdict = judge(claim(relation, margin), results(a=dict(enumerate(a)), b=dict(enumerate(b))))
    assert (verdict.word, verdict.seeds) == (word, 2)


def test_seeds_are_paired_and_the_difference_has_their_deviation():
    verdict = judge(claim("below"), results(a={1: 1.0, 2: 4.0, 3: 0.0}, b={2: 6.0, 1: 2.0, 4: 9.0}))
    assert (verdict.seeds, verdict.holds, verdict.left, verdict.right) == (2, 2, 2.5, 4.0)
    assert verdict.difference == -1.5 and verdict.deviation == pytest.approx(0.5**0.5)


def test_a_model_that_is_measured_once_stands_beside_every_seed():
    found = replace(results(a={1: 1.0, 2: 4.0}, b={1: 3.0}), seedless=frozenset({"b"}))
    verdict = judge(claim("below"), found)
    assert (verdict.word, verdict.seeds, verdict.left, verdict.right) == (MIXED, 2, 2.5, 3.0)
    assert judge(claim("below"), replace(found, seedless=frozenset({"a", "b"}))).seeds == 1
    assert judge(claim("below", than="c"), found).word == OPEN


def test_against_the_teacher_and_without_values():
    found = results(a={1: 1.0, 2: 1.0}, teacher={1: 2.0, 2: 2.0})
    assert judge(claim("below", than="teacher"), found).word == HOLDS
    assert judge(claim("below"), found).word == OPEN
