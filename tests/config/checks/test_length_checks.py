"""Prompt and answer must fit into what the models can read."""

import pytest


@pytest.fixture
def small(recipe):
    """The student reads 512 tokens and the teacher 300."""
    recipe.model("models/small", max_position_embeddings=300)
    recipe.document["teacher"]["path"] = "models/small"
    recipe.document["data"]["prompts"] |= {"max_prompt_length": 200, "max_response_length": 90}
    recipe.document["data"]["corpus"]["block_size"] = 400
    recipe.document["rollout"] = {"max_new_tokens": 100}
    return recipe


def test_what_fits_exactly_is_fine(small):
    assert small.problems() == {}
    assert small.problems(teacher__path="org/unknown", rollout__max_new_tokens=312) == {}


def test_sampled_answers(small):
    for method in ({"name": "minillm"}, {"name": "gkd", "on_policy": 0.1}, {"name": "seqkd"}):
        found = small.problems(rollout__max_new_tokens=101, method=method)
        assert set(found) == {"rollout.max_new_tokens"}
    message = found["rollout.max_new_tokens"]
    assert "data.prompts.max_prompt_length" in message and "301" in message and "300" in message
    assert "teacher models/small" in message
    for method in ({"name": "sft"}, {"name": "kd"}, {"name": "gkd", "on_policy": 0.0}):
        assert small.problems(rollout__max_new_tokens=101, method=method) == {}


def test_references(small):
    for method in ({"name": "kd"}, {"name": "gkd", "on_policy": 0.9}):
        found = small.problems(data__prompts__max_response_length=101, method=method)
        assert set(found) == {"data.prompts.max_response_length"}
    for method in ({"name": "minillm"}, {"name": "seqkd"}, {"name": "gkd", "on_policy": 1.0}):
        assert small.problems(data__prompts__max_response_length=101, method=method) == {}
    # sft has no use for the teacher, and the student reads more
    assert small.problems(data__prompts__max_response_length=312, method={"name": "sft"}) == {}
    found = small.problems(data__prompts__max_response_length=313, method={"name": "sft"})
    assert "student models/big" in found["data.prompts.max_response_length"]


def test_plain_prompts_count_their_own_length(small):
    prompts = {"type": "text", "path": "data/book.txt", "prompt_length": 201, "max_response_length": 90}
    found = small.problems(data={"prompts": prompts, "corpus": {"path": "data/*.txt", "block_size": 300}})
    assert "data.prompts.prompt_length" in found["rollout.max_new_tokens"]


def test_blocks_of_the_corpus(small):
    assert set(small.problems(data__corpus__block_size=513)) == {"data.corpus.block_size"}
    assert small.problems(data__corpus__block_size=513, method={"name": "minillm", "lm_coef": 0}) == {}
    found = small.problems(method={"name": "minillm", "pt_kd_ratio": 0.5})  # then the teacher reads them too
    assert "400 tokens are more than the 300" in found["data.corpus.block_size"]


def test_evaluation_sets(small):
    held_out = {"path": "data/train.jsonl", "max_prompt_length": 200, "max_response_length": 90}
    found = small.problems(eval={"sets": {"a": held_out}, "max_new_tokens": 101})
    assert set(found) == {"eval.max_new_tokens"}
    assert "eval.sets.a.max_prompt_length" in found["eval.max_new_tokens"]
    assert small.problems(eval={"sets": {"a": held_out}, "max_new_tokens": 101, "teacher": False}) == {}
    long = held_out | {"max_response_length": 400}  # only the student reads references
    found = small.problems(eval={"sets": {"a": long}, "max_new_tokens": 50})
    assert set(found) == {"eval.sets.a.max_response_length"}


def test_a_stage_that_inherits_the_student_has_its_context(small):
    own = {"student": {"path": "stage:one"}, "teacher": {"path": "models/big"}, "rollout": {"max_new_tokens": 313}}
    found = small.problems(stages={"one": {}, "two": own})
    assert "stage:one" in found["stages.two.rollout.max_new_tokens"]


def test_nothing_is_said_of_a_length_that_is_itself_wrong(small):
    found = small.problems(data__prompts__max_prompt_length=0, rollout__max_new_tokens=900)
    assert set(found) == {"data.prompts.max_prompt_length"}


def test_what_the_teacher_is_told_counts_for_it_alone(small):
    told = {
        "path": "data/train.jsonl",
        "max_prompt_length": 200,
        "max_response_length": 90,
        "teacher_context": "x {prompt}",
    }
    keys = {"method": {"name": "kd"}, "data": {"prompts": told}}
    assert small.problems(**keys) == {}
    told["max_teacher_prompt_length"] = 211
    message = small.problems(**keys)["data.prompts.max_response_length"]
    assert (
        "data.prompts.max_teacher_prompt_length" in message and "teacher models/small" in message and "301" in message
    )
    assert small.problems(teacher__path="models/big", **keys) == {}
