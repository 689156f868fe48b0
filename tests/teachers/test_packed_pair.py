"""Which models of a pair are packed, by what is asked and by what each of them can."""

from dataclasses import replace

import pytest

from minillm.models.batch import TokenSequence, collate
from minillm.models.packing import reads_packed
from minillm.teachers import packed_pair
from minillm.teachers.local import LocalTeacher
from minillm.teachers.packed_pair import settle_packing
from minillm.teachers.several import SeveralTeachers
from minillm.teachers.vocabularies import PreflightError
from tests.models.conftest import build

BATCH = collate([TokenSequence([5, 6], [7, 8]), TokenSequence([3], [4])], 0)


def packed(models) -> tuple[bool, bool]:
    return reads_packed(models.student, BATCH), reads_packed(models.teacher.model, BATCH)


@pytest.fixture
def pair(make_models):
    """make_models() with a teacher of an architecture, which reads across texts where it is OPT."""

    def make(architecture: str = "gpt2"):
        return replace(make_models(), teacher=LocalTeacher(build(architecture)))

    return make


def test_auto_packs_where_attention_goes_sequence_by_sequence_and_takes_it_back(pair):
    models = pair()
    assert settle_packing(models, "auto") == ("packing", "off", "off") and packed(models) == (False, False)
    assert settle_packing(models, "on") == ("packing", "on", "on") and packed(models) == (True, True)
    assert settle_packing(models, "auto") == ("packing", "off", "off") and packed(models) == (False, False)
    assert settle_packing(models, "on")[1] == "on"
    assert settle_packing(models, "off") == ("packing", "off", "off") and packed(models) == (False, False)


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_auto_packs_with(pair, monkeypatch, implementation):
    models = pair()
    monkeypatch.setattr(packed_pair, "packing_problem", lambda model: None)  # their kernels need a GPU
    models.student.config._attn_implementation = implementation
    assert settle_packing(models, "auto") == ("packing", "on", "off")


def test_a_model_that_leaks_falls_back_and_says_so_and_is_refused_by_name_where_it_is_asked(pair, monkeypatch):
    models = pair("opt")
    monkeypatch.setattr(packed_pair, "attends_by_sequence", lambda model: True)
    _, student, teacher = settle_packing(models, "auto")
    assert student == "on" and packed(models) == (True, False)
    assert teacher.startswith("off: OPTForCausalLM computes something else for texts put end to end")
    with pytest.raises(PreflightError, match="packing: on: teacher: OPTForCausalLM computes .*; write auto.* or off"):
        settle_packing(models, "on")


def test_teachers_are_told_apart_and_those_elsewhere_left_out(make_models, pair):
    several = SeveralTeachers({"math": pair().teacher, "chat": pair("opt").teacher}, None, frozenset())
    models = replace(make_models(), teacher=several)
    with pytest.raises(PreflightError, match="teacher 'chat': OPTForCausalLM"):
        settle_packing(models, "on")
    assert settle_packing(models, "off") == ("packing", "off", "off")
    assert settle_packing(make_models(teacher=False), "on") == ("packing", "on", "-")


def test_a_model_in_both_places_is_settled_once(make_models):
    models = make_models()
    models = replace(models, student=models.teacher.model)
    assert settle_packing(models, "on") == ("packing", "on", "on") and packed(models) == (True, True)


def test_what_rank_0_finds_holds_on_ranks_without_weights(make_models, in_ranks, monkeypatch):
    """Of a model that will be sharded, rank 0 alone has weights when the pair is looked over."""
    pairs, asked = [make_models(seed=seed) for seed in (0, 2)], []
    monkeypatch.setattr(packed_pair, "is_hollow", lambda model: model is pairs[1].student)

    def look(model):
        asked.append(model)
        return "it leaks" if model is pairs[0].student else None

    monkeypatch.setattr(packed_pair, "packing_problem", look)
    monkeypatch.setattr(packed_pair, "attends_by_sequence", lambda model: True)
    rows = in_ranks(2, lambda rank: settle_packing(pairs[rank], "auto"))
    assert rows == [("packing", "off: it leaks", "on")] * 2 and pairs[1].student not in asked
    assert not any(reads_packed(models.student, BATCH) for models in pairs)
    asked.clear()
    in_ranks(2, lambda rank: settle_packing(pairs[rank], "auto"))
    assert not asked, "a model that a later stage takes, sharded by now, is not run again"
