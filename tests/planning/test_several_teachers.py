"""Several teachers in a plan: all weights, the words of all or of the widest, and a sum of the head's gradient for each."""

import json

import pytest

from minillm.cli.main import main
from tests.planning.small import ANSWER, SHAPE, planned

KD = {"name": "kd"}


@pytest.fixture
def several(recipe, tmp_path):
    """A function that plans the small configuration with two teachers, whose second is half as wide."""

    def plan(by: dict, *overrides: str, chat: dict | None = None, **groups):
        folder = tmp_path / "chat"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({**SHAPE, "hidden_size": 32}))
        teachers = {
            "math": {"path": str(tmp_path / "teacher"), "dtype": "bfloat16"},
            "chat": chat or {"path": str(folder)},
        }
        path = recipe(**{"teacher": None, "teachers": teachers, "teachers_by": by, "method": KD, **groups})
        return path, planned(path, *overrides)

    return plan


BY_FIELD, MIXED = {"field": "domain"}, {"weights": {"math": 1, "chat": 1}}


@pytest.mark.parametrize("by", [BY_FIELD, MIXED], ids=["by field", "weights"])
def test_all_weights_and_a_gradient_of_the_head_for_each_are_counted(several, recipe, by):
    _, both = several(by)
    one = planned(recipe(method=KD))
    math, chat = both.simulation.teachers["teacher math"], both.simulation.teachers["teacher chat"]
    assert math.parameters == one.simulation.teacher.parameters
    assert both.simulation.teacher.parameters == math.parameters + chat.parameters
    weights = [stage.simulation.phases["update"].most("teacher weights") for stage in (one, both)]
    assert weights[1] - weights[0] == pytest.approx(chat.parameters * 4, abs=512)
    loss = [stage.simulation.phases["update"].most("loss buffers") for stage in (one, both)]
    head = 512 * 64 * 4
    assert head <= loss[1] - loss[0] < 2 * head  # the hidden states' too
    row = 64 * 4 + 8 if by is BY_FIELD else 64 * 2 + 32 * 4  # the widest in its dtype, and whose it is; or both
    assert both.simulation.row_bytes == row
    held = both.memory[-1].device["teacher hidden states"]
    assert held == row * both.work.waiting_rows(from_buffer=False)


def test_the_time_is_that_of_the_teachers_who_read_a_record(several):
    by_field, mixed = (several(by)[1].speed.scoring_flops for by in (BY_FIELD, MIXED))
    assert mixed == 2 * by_field > 0


def test_a_buffer_keeps_the_words_of_all(several):
    groups = {"method": {"name": "minillm", "lm_coef": 0.0, "alpha": 0.0}}
    mixed, one = several(MIXED, **groups)[1], several(BY_FIELD, **groups)[1]
    kept = [stage.memory[-1].device["rollout buffer"] for stage in (mixed, one)]
    tokens = 8 * ANSWER
    assert kept[0] - kept[1] == tokens * (64 * 2 + 32 * 4 - 64 * 4 - 8)
    assert [phase.phase for phase in mixed.memory] == ["rollout", "scoring", "update"]


def test_of_a_teacher_elsewhere_the_head_is_counted_beside_the_others_weights(several, capsys, tmp_path):
    served = {"type": "served", "url": "http://127.0.0.1:9", "model": str(tmp_path / "teacher")}
    path, both = several(MIXED, chat=served)
    assert both.simulation.teachers["teacher chat"].parameters == 640 * 64
    assert main(["plan", str(path), "--gpu", "cpu"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "teacher math" in out and "teacher chat's head" in out
    assert "the teacher chat is served by http://127.0.0.1:9: its weights are not loaded" in out
    assert main(["plan", str(path), "--gpu", "cpu", "--json"]) == 0
    stage = json.loads(capsys.readouterr().out)["stages"]["main"]
    assert set(stage["teachers"]) == {"teacher math", "teacher chat"}
    assert stage["served_teacher_chat"] == "http://127.0.0.1:9"


def test_advice_names_the_keys_of_all(several):
    from minillm.planning.advice import _candidates

    path, _ = several(MIXED)
    from minillm.config.loader.run_plan import load_run

    found = [keys for keys, _ in _candidates(load_run([path]).stages[0].config, "update", 1)]
    assert ["teachers.chat.dtype=bfloat16"] in found
    assert {"teachers.math.quantization=nf4", "teachers.chat.quantization=nf4"} in map(set, found)
