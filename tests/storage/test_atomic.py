"""Whole or not there."""

import errno
from types import SimpleNamespace

import pytest

from minillm.storage.atomic import clean, write_folder, write_text


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


def test_a_full_disk_is_called_that_whatever_the_writer_said(tmp_path, monkeypatch):
    def fail(folder):
        raise RuntimeError("unexpected pos 64 vs 0")

    with pytest.raises(RuntimeError, match="unexpected pos"):
        write_folder(tmp_path / "model", fail)
    monkeypatch.setattr("minillm.storage.atomic.shutil.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="no space left") as caught:
        write_folder(tmp_path / "model", fail)
    assert caught.value.errno == errno.ENOSPC


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
