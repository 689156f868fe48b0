"""The tests that a mutant is asked: those that run its lines."""

import json

import pytest

from tests.mutants.reached_lines import IMPORT, Reached, ReachPlugin

pytest_plugins = ["pytester"]

SOURCE = """LIMIT = 3

def bounded(x):
    if x > LIMIT:
        return LIMIT
    return x

def unused():
    return 0
"""
TESTS = """import pytest
from room.limits import bounded

@pytest.fixture(scope="module")
def large():
    return bounded(9)

def test_small():
    assert bounded(1) == 1

def test_fixture(large):
    assert large == 3

def test_other():
    assert True
"""


@pytest.fixture
def reached(pytester, tmp_path) -> Reached:
    pytester.makepyfile(**{"room/limits": SOURCE, "test_limits": TESTS})
    pytester.syspathinsert()
    path = tmp_path / "reached.json"
    plugin = ReachPlugin([pytester.path / "room"], path)
    plugin.start()
    pytester.inline_run("-p", "no:cacheprovider", plugins=[plugin])
    found = json.loads(path.read_text())
    (lines,) = found["contexts"].values()
    return Reached({"limits.py": {int(line): tests for line, tests in lines.items()}}, found["seconds"])


def names(tests: list[str]) -> set[str]:
    return {test.partition("::")[2] for test in tests}


def test_a_line_is_reached_by_the_tests_that_run_it(reached):
    assert names(reached.tests_of("limits.py", [6])) == {"test_small"}


def test_a_fixture_of_the_whole_file_is_reached_by_all_of_it(reached):
    assert names(reached.tests_of("limits.py", [5])) == {"test_small", "test_fixture", "test_other"}


def test_a_constant_is_reached_by_the_tests_of_its_module(reached):
    assert reached.contexts["limits.py"][1] == [IMPORT]
    assert "test_small" in names(reached.tests_of("limits.py", [1]))


def test_a_line_that_nothing_runs_is_reached_by_none(reached):
    assert reached.tests_of("limits.py", [9]) == []


def test_namesakes_come_first_and_then_the_quickest():
    seconds = {"tests/test_a.py::x": 0.1, "tests/test_limits.py::y": 0.9, "tests/test_b.py::z": 0.01}
    reached = Reached({"limits.py": {1: list(seconds)}}, seconds)
    assert reached.tests_of("limits.py", [1]) == ["tests/test_limits.py::y", "tests/test_b.py::z", "tests/test_a.py::x"]
