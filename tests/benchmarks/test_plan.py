"""`minillm bench plan` on models of a moment: what is predicted and measured is of the same phases."""

import json
import sys
from dataclasses import asdict, replace

import pytest

from minillm.benchmarks import plan
from minillm.benchmarks.plan_cases import CASES

SMALL = {"hidden": 64, "layers": 1, "vocab": 300, "batch": 2, "prompt": 8, "answer": 8}


def small(name: str):
    (case,) = [case for case in CASES if case.name == name]
    return replace(case, teacher_layers=case.teacher_layers and 1, side=case.side and 28, **SMALL)


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
@pytest.mark.parametrize(
    "name", ["sft", "gkd, opt", "minillm", "minillm, evaluated", "minillm, pictures", "kd, pictures in patches"]
)
def test_every_phase_of_a_plan_is_measured(name):
    case = replace(small(name), evaluated=2 if small(name).evaluated else 0)
    measured = plan._take_steps(case)
    assert all(peak > 0 for phase, peak in measured.items() if phase != "evaluation")
    assert bool(measured["evaluation"]) == ("evaluation" in plan.predict(case)) == bool(case.evaluated)


def test_a_case_travels_to_the_process_that_measures_it():
    for case in CASES:
        assert plan.Case(**json.loads(json.dumps(asdict(case)))) == case
