"""Places for results are looked at before the work."""

from pathlib import Path

import pytest

from minillm import UserError
from minillm.cli.outputs import require_file, require_folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file.txt").write_text("")
    Path("folder").mkdir()
    return tmp_path


@pytest.mark.parametrize("path", ["new.json", "new/and/deeper.json", "folder/new.json", "file.txt"])
def test_files_that_could_be_written(here, path):
    require_file("--output", Path(path))
    require_file("--output", None)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("folder", "--output: folder is a folder; name a file, such as folder/result"),
        ("file.txt/x.json", "file.txt is a file, not a folder"),
        ("file.txt/below/x.json", "file.txt is a file, not a folder"),
        ("x" * 300, "has 300 bytes"),
        ("a\nb.json", "which commands and reports could not name"),
    ],
)
def test_files_that_could_not_be_written(here, path, words):
    with pytest.raises(UserError, match=words):
        require_file("--output", Path(path))


def test_folders(here):
    for path in ("folder", "new/and/deeper"):
        require_folder("--figures", Path(path))
    require_folder("--figures", None)
    for path in ("file.txt", "file.txt/x"):
        with pytest.raises(UserError, match="--figures: .*file.txt is a file, not a folder"):
            require_folder("--figures", Path(path))


def test_what_may_not_be_written_to(here, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the tests may run as root, who may write anywhere
    for require in (require_file, require_folder):
        with pytest.raises(UserError, match="may not be written to"):
            require("--output", Path("new"))
