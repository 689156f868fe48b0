"""Keys of the sources of data that mean something with others alone."""

import pytest

from minillm.config.checks import data_checks

CHAT = {"path": "data/train.jsonl", "template": "chat", "system": "Be brief."}


@pytest.mark.parametrize("change", [{"template": "alpaca"}, {"template": ...}, {"template": "none"}])
def test_a_system_message_is_for_chats(recipe, change):
    prompts = {key: value for key, value in {**CHAT, **change}.items() if value is not ...}
    assert recipe.problems(data__prompts=CHAT) == {}
    assert "it is for chat" in recipe.problems(data__prompts=prompts)["data.prompts.system"]
    found = recipe.problems(eval={"sets": {"a": prompts, "b": CHAT}})
    assert set(found) == {"eval.sets.a.system"}


def test_a_stage_may_have_another_template_than_the_one_it_inherits_the_message_of(recipe):
    stages = {"one": {"data": {"prompts": {"template": "alpaca"}}}, "two": {}}
    assert recipe.problems(data__prompts=CHAT, stages=stages) == {}


def test_training_references_are_taken_apart_for_tasks(recipe):
    found = recipe.problems("data.prompts.parser=gsm8k", method={"name": "sft"})
    assert "makes no tasks" in found["data.prompts.parser"]
    assert recipe.problems("data.prompts.parser=gsm8k", method={"name": "step_by_step"}) == {}


def test_data_of_a_package_that_is_not_installed_are_refused_with_its_name(recipe, monkeypatch):
    sets = {"held_out": {"type": "easy_vqa", "split": "test"}}
    assert recipe.problems(data__prompts={"type": "easy_vqa"}, eval={"sets": sets}) == {}
    monkeypatch.setattr(data_checks, "is_installed", lambda name: name != "easy-vqa")
    found = recipe.problems(data__prompts={"type": "easy_vqa"}, eval={"sets": sets})
    assert set(found) == {"data.prompts.type", "eval.sets.held_out.type"}
    assert "pip install -e '.[vqa]'" in found["data.prompts.type"]
