"""A student and a teacher opened as a pair."""

import pytest

from minillm.config.models import TeacherConfig
from minillm.models.saving import save_model
from minillm.teachers.open import open_named
from minillm.teachers.preflight import PreflightError


def test_a_pair_is_frozen_and_one_model_can_stand_in_both_places(tmp_path, make_models):
    made = make_models()
    save_model(made.student, made.tokenizer, tmp_path / "student")
    save_model(made.teacher.model, made.tokenizer, tmp_path / "teacher")
    teacher = TeacherConfig(path=str(tmp_path / "teacher"))
    models, rows = open_named(str(tmp_path / "student"), teacher, device="cpu", dtype="bfloat16")
    for model in (models.student, models.teacher.model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert str(models.student.dtype) == "torch.bfloat16" and str(models.teacher.model.dtype) == "torch.float32"
    assert {"model", "tokenizer"} <= {row[0] for row in rows}

    alone, _ = open_named(str(tmp_path / "student"), None, device="cpu")
    assert alone.teacher is None
    both, _ = open_named(None, teacher, device="cpu")
    assert both.student is both.teacher.model


def test_two_tokenizers_do_not_go_together(tmp_path, make_models):
    made = make_models()
    save_model(made.student, made.tokenizer, tmp_path / "student")
    made.tokenizer.add_special_tokens({"eos_token": "<another>"})
    made.teacher.model.resize_token_embeddings(len(made.tokenizer))
    save_model(made.teacher.model, made.tokenizer, tmp_path / "teacher")
    with pytest.raises(PreflightError, match="different tokenizers"):
        open_named(str(tmp_path / "student"), TeacherConfig(path=str(tmp_path / "teacher")), device="cpu")
