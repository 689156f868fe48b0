"""Architectures from local files alone: folders, stages, pruned and fresh students, and hub names that lie beside."""

import json

import pytest

from minillm import UserError
from minillm.cli.main import main
from minillm.config.loader.run_plan import load_run
from minillm.planning.architectures import Architectures, architecture_folders, known_architecture
from tests.planning.small import PARAMETERS, SHAPE, planned


@pytest.fixture
def students(recipe):
    """The student's architecture in every stage of a configuration."""

    def read(**groups):
        plan = load_run([recipe(**groups)])
        return [Architectures(plan).student(stage) for stage in plan.stages]

    return read


def test_a_pruned_student_has_the_layers_that_it_keeps(students, tmp_path):
    (tmp_path / "model").mkdir()
    lists = {"layer_types": ["full_attention", "sliding_attention"] * 2, "use_sliding_window": True}
    shape = {**SHAPE, "model_type": "qwen2", "num_hidden_layers": 4, **lists}
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    (found,) = students(student={"path": str(tmp_path / "model"), "init": "prune", "layers": [0, 3]})
    assert found.num_hidden_layers == 2 and list(found.layer_types) == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("where", [{"every": 2}, {"layers": [0, 3]}])
def test_an_upcycled_student_is_planned_with_its_experts(where, recipe, tmp_path):
    """Three copies of two feed-forward layers and their routers, of which a token meets one expert."""
    (tmp_path / "model").mkdir()
    shape = {**SHAPE, "model_type": "qwen2", "num_hidden_layers": 4}
    (tmp_path / "model" / "config.json").write_text(json.dumps(shape))
    keys = {"num_experts": 3, "num_experts_per_tok": 1, **where}
    dense = {"path": str(tmp_path / "model"), "tokenizer": "byte"}
    before, after = (
        planned(recipe(method={"name": "sft"}, student=student, teacher=None)).simulation.student
        for student in (dense, {**dense, "init": "upcycle", "upcycle": keys})
    )
    feed_forward, router, shared_gate = 3 * 64 * 128, 3 * 64, 64
    assert after.parameters - before.parameters == 2 * (2 * feed_forward + router + shared_gate)
    assert after.idle == 2 * 2 * feed_forward and before.idle == 0


def test_a_stage_starts_from_what_an_earlier_one_left(students):
    stages = {"one": {}, "two": {"student": {"path": "stage:one", "init": "pretrained", "config": None}}}
    one, two = students(stages=stages, method={"name": "sft"})
    assert two.to_json_string() == one.to_json_string() and two.hidden_size == SHAPE["hidden_size"]


def test_a_fresh_student_has_the_vocabulary_of_its_tokenizer(students):
    shape = {key: value for key, value in SHAPE.items() if key != "vocab_size"}
    (found,) = students(student={"init": "random", "tokenizer": "byte", "config": shape})
    assert 256 <= found.vocab_size < 300


def test_a_hub_name_is_a_file_in_a_folder_beside_or_above(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "configs" / "deep" / "run.yaml"
    file.parent.mkdir(parents=True)
    folder = tmp_path / "configs" / "architectures"
    assert architecture_folders([file]) == []
    folder.mkdir()
    (folder / "some--model.json").write_text(json.dumps(SHAPE))
    (found,) = architecture_folders([file])
    assert known_architecture("some/model", [found]).resolve() == folder / "some--model.json"
    with pytest.raises(UserError, match="architecture of some/other is not known here.*some--other.json"):
        known_architecture("some/other", [found])


def test_an_unknown_model_type_is_one_line(recipe, capsys):
    path = recipe(student={"init": "random", "tokenizer": "byte", "config": {**SHAPE, "model_type": "nonsense"}})
    assert main(["plan", str(path)]) == 2
    assert "student.config.model_type: transformers knows no 'nonsense'" in capsys.readouterr().err


@pytest.fixture
def odd_model(tmp_path):
    """A model whose architecture is code in its own folder: Llama by another name."""
    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "conf.py").write_text(
        "from transformers import LlamaConfig\n\n\nclass OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
    )
    (folder / "model.py").write_text(
        "from transformers import LlamaForCausalLM\n\nfrom .conf import OddConfig\n\n\n"
        "class OddForCausalLM(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    named = {"AutoConfig": "conf.OddConfig", "AutoModelForCausalLM": "model.OddForCausalLM"}
    (folder / "config.json").write_text(json.dumps({**SHAPE, "model_type": "odd", "auto_map": named}))
    return folder


def test_remote_code_runs_where_the_configuration_says_so_and_is_one_line_elsewhere(recipe, odd_model, capsys):
    student = {"path": str(odd_model), "tokenizer": "byte"}
    path = recipe(student=student, teacher=None, method={"name": "sft"})
    assert main(["plan", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "odd cannot be planned" in line and "where trust_remote_code is true" in line
    assert planned(path, "student.trust_remote_code=true").simulation.student.parameters == PARAMETERS
