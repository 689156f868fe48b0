"""Which folder is meant by what stands on the command line."""

from pathlib import Path

import pytest

from minillm import UserError
from minillm.models.open import model_path


def hf_folder(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def test_the_folder_that_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    final = hf_folder(tmp_path / "runs" / "one" / "final")
    hf_folder(tmp_path / "runs" / "one" / "checkpoint-3")
    (tmp_path / "model.gguf").write_text("")
    assert model_path("runs/one") == str(Path("runs/one/final"))
    assert model_path("$RUNS/one") == str(final)
    for text in ("runs/one/checkpoint-3", "model.gguf", "gpt2", "org/name"):
        assert model_path(text) == text


def test_what_is_no_model_says_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hf_folder(tmp_path / "half" / "best")
    (tmp_path / "half" / "config.yaml").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"half is a run that has no final/ yet; models in it: half/best"):
        model_path("half")
    with pytest.raises(ValueError, match="empty is no model: it holds no config.json"):
        model_path("empty")
    with pytest.raises(ValueError, match="no such folder"):
        model_path("./gone")
    with pytest.raises(ValueError, match="OUTPUT_DIR/stages/warmup"):
        model_path("stage:warmup")
    with pytest.raises(UserError, match="pip install"):
        model_path("package:no_such_package/x.gguf")
