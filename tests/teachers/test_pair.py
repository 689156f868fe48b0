"""A pair: which model plays a role, and how its weights are read."""

from dataclasses import FrozenInstanceError, replace
from types import SimpleNamespace

import pytest
import torch

from minillm import UserError


def test_the_weights_of_a_role(make_models):
    models = make_models()
    assert models.model("student") is models.student and models.model("teacher") is models.teacher.model
    with pytest.raises(UserError, match="needs a teacher, and there is none"):
        replace(models, teacher=None).model("teacher")
    elsewhere = SimpleNamespace(abilities=frozenset({"sample"}), model=None)
    with pytest.raises(UserError, match="needs a teacher that can be run in this process, which SimpleNamespace"):
        replace(models, teacher=elsewhere).model("teacher")


def test_a_pair_stays_as_it_is(make_models):
    with pytest.raises(FrozenInstanceError):
        make_models().teacher = None


@pytest.mark.parametrize("roles", [("student",), ("teacher",), ("student", "teacher")])
def test_models_are_read_in_evaluation_mode_and_put_back(make_models, roles):
    models = make_models()
    both = {"student": models.student.train(), "teacher": models.teacher.model.train()}
    with models.reading(*roles):
        assert {role for role, model in both.items() if not model.training} == set(roles)
        assert not torch.is_grad_enabled()
    assert all(model.training for model in both.values()) and torch.is_grad_enabled()


def test_a_teacher_elsewhere_needs_no_weights_to_be_read(make_models):
    models = make_models()
    models.student.train()
    with replace(models, teacher=SimpleNamespace(model=None)).reading("student", "teacher"):
        assert not models.student.training
