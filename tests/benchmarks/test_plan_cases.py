"""The cases of `minillm bench plan`: valid configurations of what their line of the table says."""

from dataclasses import asdict

import pytest

from minillm.benchmarks.plan_cases import CASES, Case, load
from minillm.planning.work import work_of

DENSE = [case for case in CASES if "experts" not in case.name]


def is_what_it_says(case: Case, folder) -> None:
    (stage,) = load(case, folder).stages
    config = stage.config
    assert (config.teacher_side is None) == (case.teacher_layers is None)
    assert bool(config.teachers) == (case.second_layers is not None)
    assert config.method.name == case.method["name"] and asdict(case)["method"] == case.method
    work = work_of(config, max(1, case.ranks))
    assert all(term.batch == case.batch for term in work.terms) and work.micro_batches == case.accumulation
    assert bool(work.evaluation) == bool(case.evaluated)
    assert {term.length for term in work.terms} == {case.prompt + case.answer - 1}  # blocks of text too


@pytest.mark.parametrize("case", DENSE, ids=lambda case: case.name)
def test_a_case_is_what_its_line_says(case, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    is_what_it_says(case, tmp_path)


def test_a_mixture_of_experts_is_a_case(tmp_path):
    (case,) = [case for case in CASES if case not in DENSE]
    is_what_it_says(case, tmp_path)
