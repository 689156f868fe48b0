"""Several teachers in the place of one: together with their division, and with methods that can take the words of several."""

import pytest

from minillm.config.needs import ABILITIES
from minillm.config.root import method_classes
from tests.config.shortest import EVALUATED, shortest_method

TWO = {"math": {"path": "models/big"}, "chat": {"path": "models/big"}}
FIELD, WEIGHTS = {"field": "domain"}, {"weights": {"math": 0.7, "chat": 0.3}}
KD = {"name": "kd"}
OPENAI = {"type": "served", "protocol": "openai", "url": "http://here:1/v1", "tokenizer": "byte"}
SHARED = {"kd", "gkd", "taid", "distillm", "opd", "lm"}  # that need no key for it


def problems(recipe, **changes):
    return recipe.problems(**{"teacher": ..., "method": KD, "teachers": TWO, **changes})


@pytest.mark.parametrize("by", [FIELD, WEIGHTS])
def test_both_ways_of_division_are_valid(recipe, by):
    assert problems(recipe, teachers_by=by) == {}
    several = recipe.load(teacher=..., method=KD, teachers=TWO, teachers_by=by).stages[0].config.teacher_side
    assert list(several.teachers) == ["math", "chat"]
    assert several.weights == (None if by is FIELD else {"math": 0.7, "chat": 0.3})


@pytest.mark.parametrize("by", [FIELD, WEIGHTS])
def test_one_on_servers_of_the_openai_protocol_may_be_among_them(recipe, by):
    several = {"teachers": {**TWO, "chat": OPENAI}, "teachers_by": by}
    assert problems(recipe, **several) == {}
    assert problems(recipe, method={"name": "gkd"}, **several) == {}
    assert recipe.problems(method=KD, teacher={**OPENAI}) == {}  # the only one, too


def test_weights_are_divided_by_their_sum(recipe):
    by = {"weights": {"chat": 1, "math": 3}}
    several = recipe.load(teacher=..., method=KD, teachers=TWO, teachers_by=by).stages[0].config.teacher_side
    assert several.weights == {"math": 0.75, "chat": 0.25}


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"teacher": {"path": "models/big"}}, "teachers", "there is a `teacher` as well"),
        ({"teachers": {"math": TWO["math"]}}, "teachers", "has math alone; write one teacher as `teacher`"),
        ({"teachers": {**TWO, "a b": TWO["math"]}}, "teachers.a b", "letters, digits, - and _"),
        ({"teachers_by": None}, "teachers_by", "missing: say who teaches which record, by `field`"),
        ({"teachers_by": {}}, "teachers_by", "expected one of `field`"),
        ({"teachers_by": {**FIELD, **WEIGHTS}}, "teachers_by", "expected one of `field`"),
        ({"teachers_by": {"weights": {"math": 1}}}, "teachers_by.weights", "names math; the teachers are math, chat"),
        ({"teachers_by": {"weights": {"math": 1, "chat": 0}}}, "teachers_by.weights.chat", "greater than 0"),
        ({"data": {"prompts": {"type": "text", "path": "data/book.txt"}}}, "data.prompts.type", "text prompts have no fields"),
        ({"eval": {"sets": {"a": {"type": "text", "path": "data/book.txt"}}}}, "eval.sets.a.type", "no fields"),
        (
            {"eval": {"preference": {"pairs": {"a": {"path": "data/train.jsonl"}}}}},
            "eval.preference.pairs.a",
            "pairs name no teacher",
        ),
        ({"method": {"name": "lm", "kd_ratio": 0.5}}, "teachers_by.field", "the teacher reads blocks of data.corpus"),
        ({"eval": {"metric": "forward_kl_nats", "sets": {"a": {"path": "data/train.jsonl"}}}}, "eval.metric", "cannot answer"),
        ({"teachers": {**TWO, "chat": {"path": "models/bug"}}}, "teachers.chat.path", "did you mean models/big"),
        ({"teachers": {**TWO, "chat": {"path": "models/big", "revision": "x"}}}, "teachers.chat.revision", "no effect"),
        ({"teachers": {**TWO, "chat": {"type": "served", "url": "x"}}}, "teachers.chat.url", "is no address"),
        ({"teachers": {**TWO, "chat": {**OPENAI, "rows": "hidden"}}}, "teachers.chat.rows", "send no hidden states"),
        ({"teachers": {**TWO, "chat": {**OPENAI, "tokenizer": None}}}, "teachers.chat.tokenizer", "send no tokenizer"),
        ({"data__prompts__teacher_context": "{prompt}", "data__prompts__max_teacher_prompt_length": 500},
         "data.prompts.max_response_length", "data.prompts.max_teacher_prompt_length"),
        ({"data__prompts__max_prompt_length": 500}, "data.prompts.max_response_length", "more than the 512"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(recipe, changes, key, said):
    found = problems(recipe, **{"teachers_by": FIELD, **changes})
    assert set(found) == {key} and said in found[key]


def test_a_division_without_teachers_does_nothing(recipe):
    assert recipe.problems(teachers_by=FIELD) == {"teachers_by": "has no effect without `teachers`"}


@pytest.mark.parametrize(
    "name", sorted(name for name, one in method_classes().items() if one(**shortest_method(name)).needs().teacher)
)
def test_methods_that_cannot_take_the_words_of_several_are_refused(recipe, name):
    method = shortest_method(name)
    found = problems(recipe, method=method, teachers_by=WEIGHTS, eval=EVALUATED)
    if name in SHARED:
        assert found == {}
    else:
        assert "teachers" in found and f"method {name} needs a teacher that can" in found["teachers"]
        assert "which several together cannot" in found["teachers"]


def test_mixing_is_refused_and_minillm_without_it_is_not(recipe):
    mixing = problems(recipe, method={"name": "minillm"}, teachers_by=WEIGHTS)
    assert mixing == {
        "teachers": f"method minillm needs a teacher that can {ABILITIES['mix']}, which several together cannot"
    }
    assert problems(recipe, method={"name": "minillm", "alpha": 0.0}, teachers_by=FIELD) == {}
    corpus = {"name": "minillm", "alpha": 0.0, "pt_kd_ratio": 0.5}
    assert set(problems(recipe, method=corpus, teachers_by=FIELD)) == {"teachers_by.field"}
    assert problems(recipe, method=corpus, teachers_by=WEIGHTS) == {}


def test_a_method_that_does_not_declare_it_is_refused(recipe, registered):
    from tests.planning.elsewhere import Elsewhere

    registered(Elsewhere)
    found = problems(recipe, method={"name": "elsewhere", "rows": ["references"], "judged": True}, teachers_by=WEIGHTS)
    assert found == {
        "teachers": "method elsewhere needs a teacher that can be the only one, which several together cannot"
    }


def test_a_stage_that_has_one_teacher_takes_the_several_away(recipe):
    stages = {"one": {"teachers": None, "teachers_by": None, "teacher": {"path": "models/big"}}, "two": {}}
    assert problems(recipe, teachers_by=WEIGHTS, stages=stages) == {}


def test_a_method_without_a_teacher_needs_no_field(recipe):
    """Of a recipe whose stages share several teachers, one fine-tunes on plain texts."""
    data = {"prompts": {"type": "text", "path": "data/book.txt"}}
    assert problems(recipe, method={"name": "sft"}, data=data, teachers_by=FIELD) == {}


def test_quantised_and_sharded_teachers_do_not_stand_side_by_side(recipe, monkeypatch):
    from minillm.config.checks import deepspeed_checks, model_checks

    monkeypatch.setattr(deepspeed_checks, "is_installed", lambda name: True)
    monkeypatch.setattr(model_checks, "missing_packages", lambda *names: [])
    teachers = {**TWO, "chat": {"path": "models/big", "quantization": "nf4"}}
    found = problems(recipe, teachers=teachers, teachers_by=WEIGHTS, engine={"type": "deepspeed"})
    assert "quantise all of them or none" in found["teachers.chat.quantization"]
    engine = {"type": "deepspeed", "replicate_teacher": True}
    assert problems(recipe, teachers=teachers, teachers_by=WEIGHTS, engine=engine) == {}


@pytest.mark.parametrize(
    ("changes", "key", "said"),
    [
        ({"teachers": {**TWO, "chat": OPENAI}}, "teachers_by.in_memory", "of the teachers math is local"),
        ({"engine": {"type": "deepspeed", "stage": 3}}, "teachers_by.in_memory", "set engine.replicate_teacher"),
        (
            {"method": {"name": "minillm", "alpha": 0.0, "lm_coef": 1.0, "pt_kd_ratio": 0.5},
             "data": {"prompts": {"path": "data/train.jsonl"}, "corpus": {"path": "data/book.txt"}}},
            "teachers_by.in_memory", "blocks of data.corpus beside its prompts",
        ),
        ({"train": {"packing": "on"}}, "train.packing", "opened in turn read padded batches"),
    ],
)  # fmt: skip
def test_one_in_memory_at_a_time_needs_texts_that_are_known(changes, key, said, recipe):
    assert said in problems(recipe, **{"teachers_by": {**WEIGHTS, "in_memory": "one"}, **changes})[key]
    assert problems(recipe, teachers_by={**WEIGHTS, "in_memory": "one"}) == {}


def test_steps_of_a_turn_need_turns(recipe):
    said = problems(recipe, teachers_by={**WEIGHTS, "in_memory": "all", "turn_steps": 4})
    assert "all are in memory" in said["teachers_by.turn_steps"]
