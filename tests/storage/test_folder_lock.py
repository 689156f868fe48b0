"""One process at a time: the second is told who holds the folder, and nothing outlives the process that holds it."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from minillm import UserError
from minillm.storage import folder_lock
from minillm.storage.background import BackgroundWork
from minillm.storage.folder_lock import LOCK, FolderInUseError, hold_folder
from tests.runs import in_a_child

# holds a folder until its input ends, and has a child that does not end before either; prints the child's id
HOLDER = """
import os, sys
from pathlib import Path
from minillm.storage.folder_lock import hold_folder

with hold_folder(Path(sys.argv[1]), note=sys.exit):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def hold(folder: Path):
    return hold_folder(folder, note=pytest.fail)


class Holder(NamedTuple):
    process: subprocess.Popen
    child: int  # its id


@pytest.fixture
def other(tmp_path) -> Iterator[Holder]:
    """Another process that holds tmp_path / "run"."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "run")], **pipes) as process:
        yield Holder(process, int(process.stdout.readline()))
        process.kill()


def test_a_second_process_is_told_who_holds_the_folder(other, tmp_path):
    with pytest.raises(FolderInUseError) as error, hold(tmp_path / "run"):
        pytest.fail("two processes hold one folder")
    host = re.escape(os.uname().nodename)
    assert re.fullmatch(
        rf"{tmp_path / 'run'} is in use: process {other.process.pid} on {host} has been writing to it since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4}\. Wait for its end, or choose another output_dir",
        str(error.value),
    )
    assert error.value.exit_status == 2


def test_the_lock_ends_with_its_process_however_that_ends(other, tmp_path):
    os.kill(other.process.pid, signal.SIGKILL)
    other.process.wait()
    assert (tmp_path / "run" / LOCK).exists()
    os.kill(other.child, 0)  # it is still there, and holds nothing
    with hold(tmp_path / "run"):
        pass


def test_a_folder_that_was_given_back_can_be_held_again(tmp_path):
    for _ in range(2):
        with hold(tmp_path / "deep" / "run"):
            assert str(os.getpid()) in (tmp_path / "deep" / "run" / LOCK).read_text()
        assert (tmp_path / "deep" / "run" / LOCK).read_text() == ""
    with pytest.raises(KeyError), hold(tmp_path / "run"):
        raise KeyError
    with hold(tmp_path / "run"):
        pass


def test_a_process_holds_a_folder_as_often_as_it_likes_under_any_name(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with hold(tmp_path / "run"):
        with hold(tmp_path / "link"):
            pass
        assert in_a_child(lambda: hold(tmp_path / "run").__enter__()) != 0, "by the parent, also for its child"
    assert in_a_child(lambda: hold(tmp_path / "run").__enter__()) == 0


def test_folders_of_two_runs_are_held_apart(other, tmp_path):
    with hold(tmp_path / "another run"):
        pass


def test_a_holder_that_has_not_said_its_name_is_another_process(other, tmp_path):
    for text in ("", "{}", "[]", '{"pid": 1'):
        (tmp_path / "run" / LOCK).write_text(text)
        with pytest.raises(FolderInUseError, match="another process is writing to it"), hold(tmp_path / "run"):
            pass


def test_a_disk_without_locks_is_said_and_used(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(folder_lock.fcntl, "flock", refuse)
    notes = []
    with hold_folder(tmp_path, note=notes.append):
        assert len(notes) == 1 and "No locks available" in notes[0] and "no second run" in notes[0]


def test_a_folder_that_cannot_be_made_is_the_persons_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run cannot be written to: .*; choose another output_dir"):
        with hold(tmp_path / "file" / "run"):
            pass


def test_what_an_interrupted_run_of_this_process_still_writes_is_waited_for(tmp_path):
    work, may_end = BackgroundWork(), threading.Event()

    def write() -> None:
        assert may_end.wait(60)
        (tmp_path / "last").write_text("whole")

    with hold(tmp_path):
        work.start(write)
    threading.Timer(0.1, may_end.set).start()
    with hold(tmp_path):
        assert (tmp_path / "last").read_text() == "whole"
