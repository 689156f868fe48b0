"""What must hold between groups, reported together and only where its cause is not already."""

import inspect

import pytest
import transformers

from minillm.config.training import SCHEDULES


def test_the_recipe_itself_is_fine(recipe):
    assert recipe.problems() == {}


@pytest.mark.parametrize("name", ["minillm", "kd", "seqkd", "gkd"])
def test_methods_that_need_a_teacher(recipe, name):
    assert recipe.problems(teacher=..., method={"name": name}) == {"teacher": f"missing: method {name} needs one"}
    assert recipe.problems(teacher=None, method={"name": "sft"}) == {}


@pytest.mark.parametrize("name", ["minillm", "sft", "kd", "seqkd", "gkd"])
def test_every_method_needs_prompts(recipe, name):
    found = recipe.problems(method={"name": name}, data={"corpus": {"path": "data/*.txt"}})
    assert found == {"data.prompts": f"missing: method {name} trains on prompts"}


def test_the_pretraining_loss_needs_a_corpus(recipe):
    assert "lm_coef is 1" in recipe.problems(data__corpus=...)["data.corpus"]
    assert recipe.problems(data__corpus=..., method={"name": "minillm", "lm_coef": 0}) == {}
    assert recipe.problems(data__corpus=..., method={"name": "kd"}) == {}


def test_training_must_end(recipe):
    assert "how long to train" in recipe.problems(train={})["train.max_steps"]
    for limit in ({"num_train_epochs": 0.5}, {"max_seconds": 60}, {"max_student_tokens": 1000}):
        assert recipe.problems(train=limit) == {}


def test_a_misspelt_limit_is_one_problem_and_not_two(recipe):
    assert set(recipe.problems(train={"max_step": 3})) == {"train.max_step"}
    assert set(recipe.problems(train={"max_steps": "three"})) == {"train.max_steps"}


@pytest.mark.parametrize(
    ("kind", "arguments", "wrong"),
    [
        ("cosine", {}, {}),
        ("cosine", {"num_cycles": 1}, {}),
        ("cosine", {"min_lr": 1e-6}, {"train.lr_scheduler_kwargs.min_lr": "it takes num_cycles"}),
        ("constant", {"power": 1}, {"train.lr_scheduler_kwargs.power": "it takes none"}),
        ("cosine_with_min_lr", {}, {"train.lr_scheduler_kwargs": "needs min_lr or min_lr_rate"}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, {}),
        ("warmup_stable_decay", {}, {"train.lr_scheduler_kwargs": "needs num_decay_steps"}),
        ("warmup_stable_decay", {"num_decay_steps": 4}, {}),
    ],
)
def test_arguments_of_schedules(recipe, kind, arguments, wrong):
    found = recipe.problems(train__lr_scheduler_type=kind, train__lr_scheduler_kwargs=arguments)
    assert set(found) == set(wrong)
    for path, words in wrong.items():
        assert words in found[path]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_that_count_steps_must_know_them(recipe, kind):
    arguments = {key: 1 for key in SCHEDULES[kind].needs_one_of[:1]}
    train = {"max_seconds": 60, "lr_scheduler_type": kind, "lr_scheduler_kwargs": arguments}
    assert bool(recipe.problems(train=train)) == SCHEDULES[kind].counts_steps
    assert recipe.problems(train=train | {"max_steps": 10}) == {}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_table_of_schedules_is_what_transformers_has(kind):
    function = transformers.optimization.TYPE_TO_SCHEDULER_FUNCTION[transformers.SchedulerType(kind)]
    parameters = inspect.signature(function).parameters
    own = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    numbers = {name for name, one in parameters.items() if name not in own and not isinstance(one.default, str)}
    assert numbers == set(SCHEDULES[kind].takes)
    counts = "num_training_steps" in parameters
    assert counts == SCHEDULES[kind].counts_steps


def test_the_metric_must_be_measurable(recipe):
    sets = {"a": {"path": "data/train.jsonl"}}
    without = {"teacher": ..., "method": {"name": "sft"}}
    for metric in ("reverse_kl_nats", "sequence_reverse_kl_nats", "forward_kl_nats"):
        assert recipe.problems(eval={"sets": sets, "metric": metric}) == {}
        found = recipe.problems(eval={"sets": sets, "metric": metric}, **without)
        assert "there is no teacher" in found["eval.metric"]
        found = recipe.problems(eval={"sets": sets, "metric": metric, "teacher": False})
        assert "eval.teacher is false" in found["eval.metric"]
        assert recipe.problems(eval={"metric": metric}, **without) == {}  # nothing is evaluated
    assert recipe.problems(eval={"sets": sets, "metric": "loss_nats"}, **without) == {}


def test_a_seed_is_named_once(recipe):
    assert "names 3 more than once" in recipe.problems(eval={"seeds": [3, 4, 3]})["eval.seeds"]


def test_parameters_of_a_divergence_that_has_them(recipe):
    found = recipe.problems(method={"name": "kd", "divergence": "tvd", "beta": 0.2, "skew": 0.3})
    assert set(found) == {"method.beta", "method.skew"}
    assert recipe.problems(method={"name": "kd", "divergence": "jsd", "beta": 0.2}) == {}
    assert recipe.problems(method={"name": "kd", "divergence": "skew_reverse_kl", "skew": 0.2}) == {}


def test_checks_of_other_groups_are_made_beside_errors_of_one(recipe):
    found = recipe.problems(method={"name": "minilm"}, rollout={"top_p": 2}, train={}, teacher__path="./gone")
    assert set(found) == {"method.name", "rollout.top_p", "train.max_steps", "teacher.path"}
