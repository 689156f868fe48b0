"""What must hold between groups, reported together and only where its cause is not already."""


def test_the_recipe_itself_is_fine(recipe):
    assert recipe.problems() == {}


def test_a_misspelt_limit_is_one_problem_and_not_two(recipe):
    assert set(recipe.problems(train={"max_step": 3})) == {"train.max_step"}
    assert set(recipe.problems(train={"max_steps": "three"})) == {"train.max_steps"}


def test_checks_of_other_groups_are_made_beside_errors_of_one(recipe):
    found = recipe.problems(method={"name": "minilm"}, rollout={"top_p": 2}, train={}, teacher__path="./gone")
    assert set(found) == {"method.name", "rollout.top_p", "train.max_steps", "teacher.path"}


def test_a_key_without_effect_is_a_problem_on_the_command_line_and_beside_its_cause(recipe):
    schedule = {"lr_scheduler_type": "constant", "warmup_steps": 5, "max_steps": 3}
    assert "has no effect on the schedule constant" in recipe.problems(train=schedule)["train.warmup_steps"]
    # a file that several methods or schedules share is fine: the override is the wish of the moment
    assert recipe.problems("train.lr_scheduler_type=constant", train__warmup_steps=5) == {}
    assert recipe.problems("method.name=sft", rollout={"buffer_size": 8}) == {}
    found = recipe.problems("rollout.buffer_size=8", method={"name": "sft"})
    assert found == {"rollout.buffer_size": "has no effect: method sft samples no answers"}
    found = recipe.problems("data.corpus={path: data/*.txt, limit: 3}", method={"name": "kd"})
    assert set(found) == {"data.corpus.path", "data.corpus.limit"}


def test_a_default_that_is_written_out_is_no_mistake(recipe):
    assert recipe.problems(train={"lr_scheduler_type": "constant", "warmup_steps": 0, "max_steps": 3}) == {}
    assert recipe.problems(method={"name": "kd", "divergence": "tvd", "beta": 0.5}) == {}
    lmops = {"name": "minillm", "preset": "lmops", "lm_coef": 0}
    assert recipe.problems(method={**lmops, "pt_kd_ratio": 0.5}) == {}
    assert set(recipe.problems(method={**lmops, "pt_kd_ratio": 0.4})) == {"method.pt_kd_ratio"}


def test_a_key_that_comes_from_one_in_error_is_not_called_without_effect(recipe):
    assert set(recipe.problems("rollout.buffer_size=8", method={"name": "sftt"})) == {"method.name"}
    found = recipe.problems(train={"lr_scheduler_type": "constantt", "warmup_steps": 5, "max_steps": 3})
    assert set(found) == {"train.lr_scheduler_type"}
