"""The sizes of models that are not loaded."""

import pytest

from minillm.config.checks.facts import Architecture, Facts, architecture_of
from minillm.config.models import StudentConfig, TeacherConfig


def facts(student: dict, *, earlier=None, teacher: str | None = None) -> Facts:
    groups = {"student": StudentConfig(**student), "teacher": TeacherConfig(path=teacher) if teacher else None}
    return Facts("this", {}, groups, [], earlier or {}, ("this",))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_hidden_layers": 5, "max_position_embeddings": 64}, Architecture(64, 5)),
        ({"n_layer": 3, "n_positions": 32}, Architecture(32, 3)),
        ({"text_config": {"num_hidden_layers": 2}, "max_position_embeddings": 9}, Architecture(None, 2)),
        ({"num_hidden_layers": "many"}, Architecture()),
    ],
)
def test_folders(recipe, config, expected):
    folder = str(recipe.model("some", **config))
    assert architecture_of(facts({"path": folder}), "student") == expected
    assert architecture_of(facts({}, teacher=folder), "teacher") == expected


def test_what_is_not_known(recipe):
    (recipe.model("broken") / "config.json").write_text("[1")
    (recipe.model("list") / "config.json").write_text("[1]")
    for path in ("org/name", "broken", "list", "gone", None):
        assert architecture_of(facts({"path": path}), "student") == Architecture()
    assert architecture_of(facts({}), "teacher") == Architecture()


def test_pruned_random_and_earlier_students(recipe):
    pruned = facts({"path": "models/big", "init": "prune", "layers": [0, 4]})
    assert architecture_of(pruned, "student") == Architecture(512, 2)
    assert architecture_of(pruned, "student", pruned=False) == Architecture(512, 5)
    assert architecture_of(facts({"path": "models/big", "init": "prune", "layers": 3}), "student").layers == 3
    random = facts({"path": "models/big", "init": "random", "config": {"num_hidden_layers": 1}})
    assert architecture_of(random, "student") == Architecture(512, 1)
    later = facts({"path": "stage:first"}, earlier={"first": pruned}, teacher="stage:first")
    assert architecture_of(later, "student") == architecture_of(later, "teacher") == Architecture(512, 2)
    assert architecture_of(facts({"path": "stage:gone"}), "student") == Architecture()
