"""The part of a configuration that an evaluation takes, and what it does not."""

from pathlib import Path

import pytest

from minillm.config.errors import ConfigErrors
from minillm.config.loader.evaluation_plan import load_evaluation

WHOLE = """
output_dir: runs/stories
student: {path: models/big}
teacher: {path: models/big}
data: {prompts: {path: data/train.jsonl}}
method: {name: sft}
train: {max_steps: 3}
eval: {sets: {a: {path: data/train.jsonl}}}
stages:
  warmup: {}
"""


def test_evaluation_takes_its_groups_and_ignores_the_others(recipe):
    file = recipe.write("teacher: {path: models/big}\neval: {sets: {a: {path: data/train.jsonl}}}\n")
    plan = load_evaluation([file], ["eval.seeds=[1, 2]", "seed=5"])
    assert (plan.teacher.path, list(plan.eval.sets), plan.eval.seeds, plan.seed) == ("models/big", ["a"], [1, 2], 5)
    whole = recipe.write(WHOLE + "  last: {eval: {max_new_tokens: 9}, teacher: {path: stage:warmup}}\n", "whole.yaml")
    plan = load_evaluation([whole])
    assert (plan.eval.max_new_tokens, plan.teacher.path, plan.output_dir) == (9, "stage:warmup", Path("runs/stories"))


def test_evaluation_names_what_is_wrong_with_what_it_needs(recipe):
    file = recipe.write("teacher: {pth: x}\nevl: 3\neval: {sets: {a: {path: gone.jsonl}}}\ntrain: {lr: 3}\n")
    with pytest.raises(ConfigErrors) as caught:
        load_evaluation([file])
    assert [problem.path for problem in caught.value.problems] == ["teacher.pth", "evl", "eval.sets.a.path"]
    with pytest.raises(ConfigErrors, match="eval.sets: missing"):
        load_evaluation([recipe.write(recipe.document)])
    with pytest.raises(ConfigErrors, match="stages.a"):
        load_evaluation([recipe.write("stages: {a: 3}\n")])


def problems_of(file, *overrides) -> dict[str, str]:
    with pytest.raises(ConfigErrors) as caught:
        load_evaluation([file], overrides)
    return {problem.path: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_steps=3", "it takes output_dir, seed, teacher, teachers, teachers_by, engine, rollout, eval"),
        ("student.tokenizer=byte", "it takes output_dir"),
        ("rollout.temperature=0.5", "rollout.temperature is for training; write eval.temperature"),
        ("rollout.buffer_size=8", "rollout.buffer_size is for training"),
        ("eval.steps=3", "eval.steps is for training"),
        ("eval.max_new_tokens=5", "stage last has its own; write stages.last.eval.max_new_tokens"),
        ("stages.warmup.eval.top_k=3", "it takes the keys of the last stage, last"),
    ],
)
def test_an_override_that_an_evaluation_does_not_take_is_a_problem(recipe, override, words):
    file = recipe.write(WHOLE + "  last: {eval: {max_new_tokens: 9}}\n")
    key = override.partition("=")[0]
    found = problems_of(file, override)
    assert list(found) == [key] and words in found[key] and "has no effect" in found[key]


def test_overrides_of_the_last_stage_and_of_what_it_inherits_are_taken(recipe):
    file = recipe.write(WHOLE + "  last: {eval: {max_new_tokens: 9}}\n")
    plan = load_evaluation([file], ["stages.last.eval.max_new_tokens=5", "eval.top_k=3", "rollout.cuda_graphs=false"])
    assert (plan.eval.max_new_tokens, plan.eval.top_k) == (5, 3)
