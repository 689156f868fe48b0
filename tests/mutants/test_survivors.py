"""A mutation run on a tree of one small module, whose tests notice some changes and not others."""

import time
from collections import Counter

import pytest

from tests.mutants.survivors import ROOMS, ROOT, Room, Run, candidates, in_fork, markdown, share, sources

SOURCE = """def bounded(x):
    if x > 3:
        return 3
    return x

def unused():
    return 1
"""
TESTS = """from room.limits import bounded

def test_small():
    assert bounded(1) == 1

def test_large():
    assert bounded(9) == 3

def test_that_fails_anyway():
    assert bounded(9) == 4
"""


@pytest.fixture
def tree(tmp_path):
    for name, text in (("room/limits.py", SOURCE), ("tests/test_limits.py", TESTS)):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    (tmp_path / "tree" / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    return tmp_path / "tree"


def test_each_mutant_has_the_outcome_that_its_tests_give_it(tree, capsys):
    run, room = Run(tree, seconds=10.0), Room("room", ("tests",))
    reached = run.measure(room)
    assert "test_limits.py::test_that_fails_anyway" in capsys.readouterr().out
    assert sorted(test.partition("::")[2] for test in reached.seconds) == ["test_large", "test_small"]
    outcomes = {
        (mutant.line, mutant.before, mutant.after): run.outcome(file, mutant, reached)
        for file, mutant in candidates(tree, room)
    }
    assert outcomes == {
        (2, "x > 3", "x >= 3"): "survived",  # the same answer at 3
        (2, "x > 3", "x <= 3"): "killed",
        (2, "3", "4"): "survived",
        (2, "3", "2"): "survived",
        (3, "return 3", "return"): "killed",
        (3, "3", "4"): "killed",
        (3, "3", "2"): "killed",
        (4, "return x", "return"): "killed",
        (7, "return 1", "return"): "not reached",
        (7, "1", "2"): "not reached",
        (7, "1", "0"): "not reached",
    }
    assert (tree / "room/limits.py").read_text() == SOURCE


def test_tests_that_cannot_be_read_end_the_run(tree):
    (tree / "tests/test_limits.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(SystemExit, match="tests cannot be run: pytest ends with 2"):
        Run(tree, seconds=10.0).measure(Room("room", ("tests",)))


def test_a_fork_is_ended_when_its_time_is_up():
    assert in_fork(lambda: 3, seconds=30) == 3
    began = time.monotonic()
    assert in_fork(lambda: time.sleep(60), seconds=0.2) is None and time.monotonic() - began < 30


def test_the_rooms_are_there():
    for room in ROOMS.values():
        assert sources(ROOT, room) and all((ROOT / test).exists() for test in room.tests)


def test_the_percentage_is_of_the_mutants_that_were_reached():
    assert share(Counter({"killed": 5, "too slow": 1, "survived": 2, "not reached": 8})) == "75%"
    assert share(Counter({"not reached": 8})) == "-"


def test_a_bar_in_a_cell_does_not_end_it():
    assert markdown(("a", "b"), [("x | y", 2)]) == "| a | b |\n| --- | --- |\n| x \\| y | 2 |"
