"""What `minillm plan` prints, for people and as JSON."""

import json

from minillm.cli.main import main
from tests.planning.small import PARAMETERS


def test_the_command_and_its_json(recipe, capsys):
    path = str(recipe())
    assert main(["plan", path, "rollout.shared_coins=false", "--gpu", "4090"]) == 0
    shown = capsys.readouterr().out
    for text in (f"{PARAMETERS:,}", "student KV cache", "full logits would take", "fits: peak", "(an estimate)"):
        assert text in shown
    assert main(["plan", path, "--gpu", "cpu", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    stage = data["stages"]["main"]
    assert stage["parameters"]["student"] == PARAMETERS and data["fits"] is True and data["advice"] == []
    assert stage["estimated_seconds_per_step"] is None  # nothing is known of this machine's speed
    assert sum(stage["memory_bytes"][stage["peak_phase"]]["device"].values()) == data["peak_bytes"]


def test_what_a_method_trains_beside_the_student_is_named(recipe, methods_of_elsewhere, capsys):
    path = recipe(method={"name": "elsewhere", "samplers": ["student"], "trains": ["student", "projector"]})
    assert main(["plan", str(path)]) == 0
    assert "not counted: what the method trains beside the student: projector" in capsys.readouterr().out
    assert main(["plan", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"]["main"]["not_counted"]


def test_a_stage_with_nothing_to_plan_is_said_in_one_line(recipe, with_a_sieve, methods_of_elsewhere, capsys):
    path = with_a_sieve(corpus=False)
    assert main(["plan", str(path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "stage choose is not in the plan: method sieve takes no step and declares neither answers nor texts" in shown
    assert main(["plan", str(path), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert list(data["unplanned"]) == ["choose"] and list(data["stages"]) == ["train"]
    alone = recipe(method={"name": "sieve", "corpus": False})
    assert main(["plan", str(alone)]) == 2
    assert "stage 'main': method sieve takes no step" in capsys.readouterr().err
