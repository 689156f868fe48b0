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


TOLD = {"path": "data/train.jsonl", "teacher_context": "{reference}"}


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ({"name": "minillm", "alpha": 0.2}, "samples every token from a mixture"),
        ({"name": "cmc"}, "adds the student's logits"),
        ({"name": "okd"}, "trains the teacher"),
        ({"name": "llavadi", "features_tokens": "all"}, "at the tokens of prompts too"),
        ({"name": "llavadi", "features_coef": 0.0, "logits_tokens": "text"}, "at the tokens of prompts too"),
    ],
)
def test_a_context_for_the_teacher_alone_is_refused_where_both_read_one_text(recipe, method, why):
    found = recipe.problems(data__prompts=TOLD, method=method)
    assert why in found["data.prompts.teacher_context"]
    del recipe.document["data"]
    assert "data.prompts.teacher_context" not in recipe.problems(
        data={"prompts": {"path": "data/train.jsonl"}}, method=method
    )


@pytest.mark.parametrize(
    "method",
    [
        {"name": "kd"},
        {"name": "gkd"},
        {"name": "minillm", "alpha": 0.0},
        {"name": "opd"},
        {"name": "seqkd"},
        {"name": "taid", "steps": 5},
        {"name": "distillm2"},
        {"name": "llavadi", "features_tokens": "answers", "logits_tokens": "answers"},
        {"name": "gold"},
        {"name": "cache"},
    ],
)
def test_a_context_is_for_every_method_whose_teacher_reads_prompts(recipe, method):
    corpus = {"corpus": {"path": "data/*.txt"}} if method["name"] == "minillm" else {}
    assert recipe.problems(data={"prompts": TOLD, **corpus}, method=method) == {}


def test_a_context_that_nobody_reads_has_no_effect(recipe):
    key = "data.prompts.teacher_context=hint"
    assert (
        "in method sft no teacher reads the prompts"
        in recipe.problems(key, method={"name": "sft"})["data.prompts.teacher_context"]
    )
    sets = {"a": {"path": "data/train.jsonl", "teacher_context": "hint"}}
    assert recipe.problems(eval={"sets": sets}) == {}
    found = recipe.problems(
        "eval.sets.a.teacher_context=hint", eval={"sets": sets}, method={"name": "sft"}, teacher=...
    )
    assert "there is no teacher" in found["eval.sets.a.teacher_context"]
    stages = {"warmup": {"method": {"name": "sft"}}, "distil": {"method": {"name": "kd"}}}
    assert recipe.problems(data={"prompts": TOLD}, stages=stages) == {}  # of two stages one has a use for it


def test_the_keys_of_a_context_go_together(recipe):
    alone = recipe.problems("data.prompts.max_teacher_prompt_length=300", method={"name": "kd"})
    assert "no effect without teacher_context" in alone["data.prompts.max_teacher_prompt_length"]
    for form in ("{context}", "{prompt} {context} {context}", "{prompt} {context} {hint}"):
        found = recipe.problems(data__prompts=TOLD | {"teacher_prompt": form}, method={"name": "kd"})
        assert "must name {prompt} and {context}" in found["data.prompts.teacher_prompt"]
    short = recipe.problems(data__prompts=TOLD | {"max_teacher_prompt_length": 200}, method={"name": "kd"})
    assert "less than max_prompt_length, 256" in short["data.prompts.max_teacher_prompt_length"]


def test_data_of_a_package_that_is_not_installed_are_refused_with_its_name(recipe, monkeypatch):
    sets = {"held_out": {"type": "easy_vqa", "split": "test"}}
    assert recipe.problems(data__prompts={"type": "easy_vqa"}, eval={"sets": sets}) == {}
    monkeypatch.setattr(data_checks, "is_installed", lambda name: name != "easy-vqa")
    found = recipe.problems(data__prompts={"type": "easy_vqa"}, eval={"sets": sets})
    assert set(found) == {"data.prompts.type", "eval.sets.held_out.type"}
    assert "pip install -e '.[vqa]'" in found["data.prompts.type"]
