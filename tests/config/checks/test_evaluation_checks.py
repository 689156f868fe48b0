"""What is asked of an evaluation can be measured, and is measured."""


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


def test_no_distance_is_measured_to_a_teacher_with_tokens_of_its_own(recipe):
    evaluation = {"sets": {"a": {"path": "data/train.jsonl"}}, "metric": "reverse_kl_nats"}
    for method in ("uld", "gold"):
        found = recipe.problems(eval=evaluation, method={"name": method}, rollout={"max_new_tokens": 8})
        assert f"in method {method} each model has tokens of its own" in found["eval.metric"]


def test_label_accuracy_is_asked_for_where_it_chooses_the_best_model(recipe):
    sets = {"a": {"path": "data/train.jsonl", "parser": "gsm8k"}}
    chosen = {"sets": sets, "metric": "label_accuracy"}
    assert "set eval.label_accuracy" in recipe.problems(eval=chosen)["eval.metric"]
    assert recipe.problems(eval={**chosen, "label_accuracy": {"compare": "equation"}}) == {}


def test_a_parser_is_for_labels_that_are_compared(recipe):
    sets = {"a": {"path": "data/train.jsonl"}}
    found = recipe.problems("eval.sets.a.parser=gsm8k", eval={"sets": sets})
    assert "without eval.label_accuracy" in found["eval.sets.a.parser"]
    assert recipe.problems("eval.sets.a.parser=gsm8k", eval={"sets": sets, "label_accuracy": {}}) == {}


def test_a_seed_is_named_once(recipe):
    assert "names 3 more than once" in recipe.problems(eval={"seeds": [3, 4, 3]})["eval.seeds"]


def test_nothing_is_set_for_an_evaluation_that_does_not_take_place(recipe):
    assert "without eval.sets" in recipe.problems("eval.steps=5")["eval.steps"]
    sets = {"a": {"path": "data/train.jsonl"}}
    assert recipe.problems("eval.steps=5", eval={"sets": sets}) == {}
    assert recipe.problems("eval.sets=null", eval={"sets": sets, "steps": 5}) == {}  # to do without, for once


def test_greedy_answers_have_no_use_for_nucleus_or_top_k(recipe):
    greedy = {"sets": {"a": {"path": "data/train.jsonl"}}, "temperature": 0.0}
    assert set(recipe.problems(eval={**greedy, "top_k": 5, "top_p": 0.9})) == {"eval.top_k", "eval.top_p"}
    assert recipe.problems(eval={**greedy, "no_repeat_ngram_size": 3}) == {}


def test_long_analyses_are_not_asked_of_training_on_the_command_line(recipe):
    evaluation = {"sets": {"a": {"path": "data/train.jsonl"}}, "exposure_bias": {"samples": 2}}
    assert recipe.problems(eval=evaluation) == {}  # the same file is for `minillm eval`
    assert (
        "minillm eval" in recipe.problems("eval.exposure_bias.samples=3", eval=evaluation)["eval.exposure_bias.samples"]
    )


def test_pairs_are_compared_with_a_teacher_that_can_be_asked(recipe):
    sets, pairs = {"a": {"path": "data/train.jsonl"}}, {"b": {"path": "data/train.jsonl"}}
    given = {"pairs": pairs}
    assert recipe.problems(eval={"sets": sets, "preference": given}) == {}
    assert recipe.problems(eval={"sets": sets, "preference": {"sampled": True}}) == {}
    named = {"pairs": {"a": given["pairs"]["b"]}}
    assert recipe.problems(eval={"sets": sets, "preference": named}) == {}
    found = recipe.problems(eval={"sets": sets, "preference": {**named, "sampled": True}})
    assert "is also a set of eval.sets" in found["eval.preference.pairs.a"]
    assert "nothing to compare" in recipe.problems(eval={"sets": sets, "preference": {}})["eval.preference.pairs"]
    found = recipe.problems(eval={"preference": {"sampled": True}})
    assert "name some in eval.sets" in found["eval.preference.sampled"]
    without = {"teacher": ..., "method": {"name": "sft"}}
    found = recipe.problems(eval={"sets": sets, "preference": given}, **without)
    assert "there is no teacher" in found["eval.preference"]
    found = recipe.problems(eval={"sets": sets, "preference": {**given, "sampled": True}, "teacher": False})
    assert set(found) == {"eval.preference", "eval.preference.sampled"}
    free = {**given, "reference_free": True}
    assert recipe.problems(eval={"sets": sets, "preference": free}, **without) == {}
    same = {"b": {"path": "data/train.jsonl", "chosen": "rejected"}}
    found = recipe.problems(eval={"sets": sets, "preference": {"pairs": same}})
    assert "eval.preference.pairs.b.chosen" in found["eval.preference.pairs.b.rejected"]


def test_pairs_are_read_whole_by_both_models(recipe):
    found = recipe.problems(
        eval={"preference": {"pairs": {"b": {"path": "data/train.jsonl", "max_response_length": 100_000}}}}
    )
    assert "more than the" in found["eval.preference.pairs.b.max_response_length"]
