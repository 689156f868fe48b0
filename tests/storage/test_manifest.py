"""Every difference between a folder and its manifest is found and named; nothing is read twice without need."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.storage import manifest
from minillm.storage.manifest import MANIFEST, SETTLED_NS, find_damage, is_signed, sign

FILES = {"config.json": b"{}", "state/engine.pt": b"weights of the optimiser", "empty": b""}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A signed folder."""
    for name, content in FILES.items():
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_bytes(content)
    sign(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_as_it_was_signed_has_no_damage(folder):
    assert is_signed(folder) and set(json.loads((folder / MANIFEST).read_text())) == set(FILES)
    assert find_damage(folder) is None
    (folder / "README.md").write_text("written later, and named by no manifest")
    assert find_damage(folder) is None
    assert find_damage(folder, requires=("README.md",)) == "manifest.json does not name README.md"
    assert not is_signed(folder / "state")
    sign(folder)
    assert find_damage(folder, requires=("README.md",)) is None


@given(st.sampled_from(sorted(FILES)), st.data())
def test_any_flipped_bit_and_any_other_length_are_found(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("model")
    for each, content in FILES.items():
        (folder / each).parent.mkdir(exist_ok=True)
        (folder / each).write_bytes(content)
    sign(folder)
    content = bytearray(FILES[name])
    if content and data.draw(st.booleans(), "same length"):
        content[data.draw(st.integers(0, len(content) - 1), "place")] ^= 1 << data.draw(st.integers(0, 7), "bit")
        expected = f"{name} was altered"
    else:
        length = data.draw(st.integers(0, 40).filter(lambda length: length != len(content)), "length")
        content = content[:length].ljust(length, b"x")
        expected = f"{name} has {length} bytes instead of {len(FILES[name])}"
    (folder / name).write_bytes(content)
    assert find_damage(folder) == expected


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", '["config.json"]', "3", "null", '{"config.json": 3}', '{"config.json": {"bytes": 2}}',
     '{"config.json": {"bytes": "2", "sha256": "x"}}'],
)  # fmt: skip
def test_json_that_is_no_manifest_proves_nothing(folder, content):
    (folder / MANIFEST).write_text(content)
    assert find_damage(folder) == "manifest.json does not give the size and SHA-256 of any file"


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_what_is_not_json_cannot_be_read(folder, content):
    (folder / MANIFEST).write_bytes(content)
    assert find_damage(folder).startswith("manifest.json cannot be read: ")


def test_a_file_in_the_place_of_the_folder_and_a_folder_in_the_place_of_a_file(folder, tmp_path):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert find_damage(folder) == "config.json is missing"
    shutil.rmtree(folder)
    folder.write_text("")
    assert find_damage(folder) == "it is a file, not a folder"
    assert find_damage(tmp_path / "gone") == "manifest.json is missing"


def test_a_disk_that_fails_while_it_is_read_is_damage(folder, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(manifest, "_fingerprint", fail)
    assert find_damage(folder) == f"{folder / 'config.json'} cannot be read: Input/output error"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The names of the files that were read to the end."""
    found, real = [], manifest._fingerprint
    monkeypatch.setattr(manifest, "_fingerprint", lambda path: (found.append(path.name), real(path))[1])
    return found


def test_files_are_read_again_only_after_a_change(folder, reads):
    settled = time.time_ns() - 2 * SETTLED_NS
    for path in folder.rglob("*"):
        os.utime(path, ns=(settled, settled))
    for _ in range(2):
        assert find_damage(folder) is None
        assert sorted(reads) == ["config.json", "empty", "engine.pt"]
    (folder / "config.json").write_bytes(b"[]")
    assert find_damage(folder) == "config.json was altered"


def test_files_of_this_moment_are_read_again(folder, reads):
    """They may change once more within the same tick of the disk's clock."""
    for times in (1, 2):
        assert find_damage(folder) is None
        assert len(reads) == 3 * times
