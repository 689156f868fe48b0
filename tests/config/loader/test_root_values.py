"""Values at the root that every stage sets for itself: checked all the same, and never an override without effect."""

import pytest

from minillm.config.errors import ConfigErrors
from minillm.config.loader.run_plan import load_run

FILE = """
output_dir: runs/x
student: {path: models/big}
teacher: {path: models/big}
data: {prompts: {path: data/train.jsonl}}
method: {name: sft}
train: {max_steps: 5}
stages:
  warmup: {train: {max_steps: 3}}
  distil: {method: {name: kd, ce_ratio: 0.1}, train: {max_steps: 4}}
"""


@pytest.fixture
def problems(recipe):
    def find(*overrides: str, text: str = FILE) -> list[str]:
        try:
            load_run([recipe.write(text)], overrides)
        except ConfigErrors as errors:
            return [str(problem) for problem in errors.problems]
        return []

    return find


def test_an_override_that_no_stage_takes_names_the_keys_to_write_instead(problems):
    assert problems("train.max_steps=9") == [
        "command line: train.max_steps: has no effect: every stage has its own; write stages.warmup.train.max_steps or "
        "stages.distil.train.max_steps"
    ]
    assert problems("stages.warmup.train.max_steps=9") == []
    assert problems("train.warmup_steps=9") == []  # both take it


def test_an_override_that_one_stage_takes_is_fine(problems):
    assert problems("train.max_steps=9", text=FILE.replace("  warmup: {train: {max_steps: 3}}", "  warmup: {}")) == []


def test_many_stages_are_not_all_listed(problems):
    more = "".join(f"  s{number}: {{train: {{max_steps: 1}}}}\n" for number in range(9))
    (problem,) = problems("train.max_steps=9", text=FILE + more)
    assert problem.endswith("stages.distil.train.max_steps, stages.s0.train.max_steps or another stage's")


def test_a_group_that_is_taken_away_in_every_stage_takes_nothing(problems):
    text = FILE.replace("method: {name: sft}", "method: {name: sft}\neval: {sets: {a: {path: data/train.jsonl}}}")
    text = text.replace("warmup: {", "warmup: {eval: null, ").replace("distil: {", "distil: {eval: null, ")
    assert problems("eval.sets.a.limit=3", text=text) == [
        "command line: eval.sets.a.limit: has no effect: no stage takes it"
    ]


def test_a_value_that_every_stage_sets_for_itself_is_checked(problems):
    assert problems(text=FILE.replace("max_steps: 5", "max_steps: many")) == [
        "run.yaml:7: train.max_steps: expected a whole number, not 'many'"
    ]
    assert problems("train.max_steps=many")[0] == "command line: train.max_steps: expected a whole number, not 'many'"
    both = FILE.replace("max_steps: 3", "max_stepz: 3, max_steps: 3").replace(
        "max_steps: 4", "max_stepz: 3, max_steps: 4"
    )
    assert "run.yaml:7: train.max_stepz: unknown key (did you mean max_steps?)" in problems(
        text=both.replace("max_steps: 5", "max_stepz: 3")
    )


def test_a_value_is_right_where_it_would_be_in_one_stage(problems):
    """The root does not say which method or which kind of data it is for: the stages do."""
    text = (
        FILE.replace("method: {name: sft}", "method: {divergence: jsd}")
        .replace("warmup: {", "warmup: {method: {name: kd, divergence: tvd}, ")
        .replace("ce_ratio: 0.1", "divergence: tvd")
    )
    assert problems(text=text) == []
    (problem,) = problems(text=text.replace("{divergence: jsd}", "{divergence: jsdd}"))
    assert problem.startswith("run.yaml:6: method.divergence: 'jsdd' is not one of")
    # keys of a method that every stage replaces
    text = FILE.replace("method: {name: sft}", "method: {name: minillm, alpha: 7}").replace(
        "warmup: {", "warmup: {method: {name: sft}, "
    )
    assert problems(text=text) == ["run.yaml:6: method.alpha: must be at most 1, not 7"]
    assert problems(text=text.replace("alpha: 7", "alpha: 0.5")) == []


def test_architectures_are_free_keys(problems):
    text = FILE.replace("student: {path: models/big}", "student: {path: models/big, init: random, config: {x: 1}}")
    text = text.replace("warmup: {", "warmup: {student: {config: {x: 2}}, ")
    text = text.replace("distil: {", "distil: {student: {config: {x: 3}}, ")
    assert problems(text=text) == []
