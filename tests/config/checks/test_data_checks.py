"""Keys of the sources of data that mean something with others alone."""

import pytest

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
