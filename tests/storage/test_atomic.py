"""Files and folders are whole or not there: after failures, after kills, on a full disk, behind symbolic links."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from minillm.storage import atomic
from minillm.storage.atomic import clean, remove_folder, write_folder, write_text


def fill(content: str):
    def write(folder):
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text(content)

    return write


def test_a_folder_is_replaced_whole(tmp_path):
    write_folder(tmp_path / "model", fill("old"))
    write_folder(tmp_path / "model", fill("new"))
    assert (tmp_path / "model" / "inner" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_all_of_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """In the order in which the system is asked; the tests themselves wait for no disk (tests/unsynced.py)."""
    rename, asked = Path.rename, []

    def flushed(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        asked.append(("flushed", str(path.relative_to(tmp_path.resolve()))))

    def renamed(self: Path, target: Path) -> Path:
        asked.append(("renamed", self.name))
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    write_folder(tmp_path / "model", fill("new"))
    partial = ".model.partial"
    inside = [("flushed", f"{partial}/inner"), ("flushed", f"{partial}/inner/file"), ("flushed", partial)]
    assert asked == [*inside, ("renamed", partial), ("flushed", ".")]
    asked.clear()
    write_text(tmp_path / "note", "whole")
    assert asked == [("flushed", ".note.partial")]


def test_a_failure_leaves_what_was_there(tmp_path):
    write_folder(tmp_path / "model", fill("old"))

    def fail(folder):
        (folder / "file").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_folder(tmp_path / "model", fail)
    clean(tmp_path)
    assert (tmp_path / "model" / "inner" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def failing(error: Exception):
    def fail(folder):
        raise error

    return fail


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        # as the two libraries that write weights say it; their files are gone by then, and the space is free again
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"),
        chained(RuntimeError("cannot save the model"), OSError(errno.ENOSPC, "No space left on device")),
    ],
)
def test_a_full_disk_is_called_that_in_whatever_words(tmp_path, error):
    with pytest.raises(OSError, match=f"no space left; what was saved before is whole: '{tmp_path}'") as caught:
        write_folder(tmp_path / "model", failing(error))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unexpected pos 64 vs 0"),
        SafetensorError("I/O error: Input/output error (os error 5)"),
        KeyError(28),
    ],
)
def test_any_other_failure_of_a_writer_keeps_its_name(tmp_path, error):
    with pytest.raises(type(error)):
        write_folder(tmp_path / "model", failing(error))


def test_a_writer_that_gives_no_reason_is_asked_of_the_disk(tmp_path, monkeypatch):
    """torch says `unexpected pos` where the disk is full. /dev/full is: every byte written to it is one too many."""
    monkeypatch.setattr(atomic.tempfile, "TemporaryFile", lambda dir: open("/dev/full", "wb"))
    with pytest.raises(OSError, match="no space left"):
        write_folder(tmp_path / "model", failing(RuntimeError("unexpected pos 64 vs 0")))


def test_a_disk_that_fills_while_a_folder_is_put_in_place_leaves_what_was_there(tmp_path, monkeypatch):
    write_folder(tmp_path / "model", fill("old"))
    monkeypatch.setattr(atomic, "sync", failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="what was saved before is whole"):
        write_folder(tmp_path / "model", fill("new"))
    clean(tmp_path)
    assert (tmp_path / "model" / "inner" / "file").read_text() == "old"


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder on another disk, where tmp_path / "run" / "model" leads."""
    (tmp_path / "run").mkdir()
    write_folder(tmp_path / "elsewhere", fill("old"))
    (tmp_path / "run" / "model").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def test_of_a_symbolic_link_the_link_alone_is_removed(tmp_path, elsewhere):
    remove_folder(tmp_path / "run" / "model")
    assert not os.listdir(tmp_path / "run") and (elsewhere / "inner" / "file").read_text() == "old"


def test_a_symbolic_link_is_replaced_by_a_folder(tmp_path, elsewhere):
    write_folder(tmp_path / "run" / "model", fill("new"))
    assert (tmp_path / "run" / "model" / "inner" / "file").read_text() == "new"
    assert os.listdir(tmp_path / "run") == ["model"] and (elsewhere / "inner" / "file").read_text() == "old"


def test_links_that_a_kill_left_are_cleaned_away(tmp_path, elsewhere):
    for name in (".model.stale", ".other.partial"):
        (tmp_path / "run" / name).symlink_to(elsewhere)
    clean(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == ["model"] and (elsewhere / "inner" / "file").read_text() == "old"


def test_a_link_that_was_set_aside_comes_back_even_where_it_leads_nowhere(tmp_path):
    (tmp_path / ".model.stale").symlink_to("gone")
    clean(tmp_path)
    assert os.listdir(tmp_path) == ["model"] and os.readlink(tmp_path / "model") == "gone"
    remove_folder(tmp_path / "model")
    assert not os.listdir(tmp_path)


def test_what_is_not_there_need_not_be_removed(tmp_path):
    remove_folder(tmp_path / "model")
    assert not os.listdir(tmp_path)


def test_a_folder_set_aside_by_a_kill_comes_back(tmp_path):
    write_folder(tmp_path / "best", fill("old"))
    (tmp_path / "best").rename(tmp_path / ".best.stale")
    write_folder(tmp_path / ".best.partial", fill("half of the new one"))
    clean(tmp_path)
    assert (tmp_path / "best" / "inner" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_file_is_replaced_whole_and_its_leftover_goes(tmp_path):
    write_text(tmp_path / "report.md", "old")
    write_text(tmp_path / "report.md", "new")
    (tmp_path / ".report.md.partial").write_text("half")
    clean(tmp_path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report.md", "new")]
