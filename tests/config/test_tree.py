"""Values that remember where they were written."""

from minillm.config.tree import Origin, dotted, wrap

TREE = wrap({"student": {"layers": [0, 2]}, "teacher": None}, Origin("run.yaml", 3))


def test_the_node_at_a_path_or_the_deepest_one_above_it():
    assert TREE.at(("student", "layers", 1)).value == 2
    assert TREE.at(("teacher",)).value is None
    assert TREE.at(("student", "layers", 2)) is None
    assert TREE.closest(("student", "path", "x")) == (TREE.value["student"], 1)


def test_every_value_knows_its_keys_and_its_line():
    assert TREE.at(("student", "layers", 1)).origin == Origin("run.yaml", 3, ("student", "layers", 1))
    problem = TREE.at(("student", "layers")).origin.problem("wrong")
    assert str(problem) == "run.yaml:3: student.layers: wrong"
    assert Origin("run.yaml", 3).below("a", 9) == Origin("run.yaml", 9, ("a",))


def test_dotted():
    assert dotted(("student", "layers", 0)) == "student.layers[0]"
    assert dotted(()) == ""
