"""Checkpoints are whole or not there: damage is found, the one before is taken, nothing partial is left."""

import json
import os

import pytest

from minillm.storage.atomic import clean
from minillm.storage.checkpoint import list_checkpoints, newest_whole, write_checkpoint
from minillm.storage.manifest import MANIFEST, find_damage, sign


def fill(content: str):
    def write(folder):
        (folder / "state").mkdir()
        (folder / "weights").write_text(content)
        (folder / "state" / "trainer.json").write_text(content * 3)

    return write


@pytest.fixture
def run(tmp_path):
    for step in (2, 4, 10):
        write_checkpoint(tmp_path, step, fill(str(step)), keep=3)
    return tmp_path


def test_the_newest_is_taken_by_number_and_old_ones_go(run):
    assert newest_whole(run, pytest.fail).name == "checkpoint-10"
    write_checkpoint(run, 12, fill("12"), keep=2)
    assert [step for step, _ in list_checkpoints(run)] == [10, 12]


def test_a_damaged_one_of_a_later_step_takes_the_place_of_none(run):
    (run / "checkpoint-10" / MANIFEST).unlink()
    write_checkpoint(run, 6, fill("6"), keep=1)
    assert [step for step, _ in list_checkpoints(run)] == [6, 10]
    assert newest_whole(run, lambda text: None).name == "checkpoint-6"


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda folder: (folder / "weights").write_text("1"), "bytes instead of"),
        (lambda folder: (folder / "weights").write_text("11"), "was altered"),
        (lambda folder: (folder / "state" / "trainer.json").unlink(), "trainer.json is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "cannot be read"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "does not give the size and SHA-256"),
        (
            lambda folder: ((folder / "state" / "trainer.json").unlink(), sign(folder)),
            "does not name state/trainer.json",
        ),
    ],
)
def test_a_damaged_checkpoint_is_passed_over_aloud(run, damage, words):
    damage(run / "checkpoint-10")
    notes = []
    assert newest_whole(run, notes.append).name == "checkpoint-4"
    assert len(notes) == 1 and "checkpoint-10" in notes[0] and words in notes[0]


def test_a_file_and_a_link_that_leads_nowhere_are_no_checkpoints_and_stay(run):
    (run / "checkpoint-1").write_text("mine")
    (run / "checkpoint-11").write_text("mine")
    (run / "checkpoint-12").symlink_to("gone")
    notes = []
    assert newest_whole(run, notes.append).name == "checkpoint-10"
    assert ["checkpoint-12 is not whole (manifest.json is missing)" in notes[0], "it is a file" in notes[1]] == [
        True
    ] * 2
    write_checkpoint(run, 13, fill("13"), keep=1)
    assert [step for step, _ in list_checkpoints(run)] == [1, 11, 12, 13]


def test_a_checkpoint_that_is_a_link_counts_and_rotation_leaves_what_it_leads_to(run, tmp_path_factory):
    disk = tmp_path_factory.mktemp("disk")
    for step in (4, 10):
        (run / f"checkpoint-{step}").rename(disk / f"checkpoint-{step}")
        (run / f"checkpoint-{step}").symlink_to(disk / f"checkpoint-{step}")
    assert newest_whole(run, pytest.fail).name == "checkpoint-10"
    write_checkpoint(run, 10, fill("ten"), keep=2)  # in the place of a link
    write_checkpoint(run, 12, fill("12"), keep=1)
    assert os.listdir(run) == ["checkpoint-12"]
    assert (disk / "checkpoint-4" / "weights").read_text() == "4"
    assert (disk / "checkpoint-10" / "weights").read_text() == "10"


def test_no_whole_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    assert newest_whole(tmp_path, lambda text: None) is None


def test_a_failure_while_writing_leaves_the_old_ones_and_no_new_one(run):
    def fail(folder):
        (folder / "weights").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_checkpoint(run, 12, fail, keep=1)
    assert [step for step, _ in list_checkpoints(run)] == [2, 4, 10]
    clean(run)
    assert not list(run.glob(".*"))


def test_writing_a_step_again_replaces_it(run):
    folder = write_checkpoint(run, 10, fill("ten"), keep=3)
    assert (folder / "weights").read_text() == "ten"
    assert find_damage(folder) is None
    assert set(json.loads((folder / MANIFEST).read_text())) == {"weights", "state/trainer.json"}


def test_a_checkpoint_set_aside_by_a_kill_comes_back(run):
    (run / "checkpoint-10").rename(run / ".checkpoint-10.stale")
    clean(run)
    assert newest_whole(run, pytest.fail).name == "checkpoint-10"
