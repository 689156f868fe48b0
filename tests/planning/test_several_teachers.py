"""Several teachers in a plan: all weights, the words of all or of the widest, and a sum of the head's gradient for each."""

import json

import pytest

from minillm.cli.main import main
from tests.pictures import save_seeing
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


def test_one_at_a_time_the_largest_and_the_heads_are_counted(several, capsys):
    """With the words of as many steps as are read in a turn, of which a step's are there anyway."""
    path, both = several(MIXED)
    _, one = several({**MIXED, "in_memory": "one", "turn_steps": 5})
    math, chat = both.simulation.teachers["teacher math"], both.simulation.teachers["teacher chat"]
    assert one.simulation.teachers == both.simulation.teachers  # of which the time is made
    assert one.speed.scoring_flops == both.speed.scoring_flops
    weights = [stage.simulation.phases["update"].most("teacher weights") for stage in (both, one)]
    largest, other = sorted((math, chat), key=lambda size: size.stored_bytes)[::-1]
    assert weights[0] - weights[1] == pytest.approx(other.stored_bytes - other.head * other.itemsize, abs=512)
    assert weights[1] > largest.stored_bytes
    held = [stage.memory[-1].device["teacher hidden states"] for stage in (both, one)]
    assert held[1] == 5 * held[0]
    assert main(["plan", str(path), "--gpu", "cpu"]) == 0
    assert "one after the other, for every 5 steps" in " ".join(capsys.readouterr().out.split())


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


def test_of_one_that_is_known_by_ids_nothing_is_loaded(several, capsys):
    chat = {"type": "served", "protocol": "openai", "url": "http://127.0.0.1:9", "tokenizer": "byte", "k": 5}
    path, both = several(BY_FIELD, chat=chat)
    assert both.simulation.teachers["teacher chat"].parameters == 0
    assert both.simulation.row_bytes == 64 * 4 + 8  # of math, which are more than 5 x 12
    assert main(["plan", str(path), "--gpu", "cpu"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "the teacher chat is served by http://127.0.0.1:9: its weights are not loaded" in out
    assert "the head alone" not in out


def test_what_they_are_told_counts_for_all_of_them(several, tmp_path):
    (tmp_path / "lines.jsonl").write_text('{"prompt": "a", "completion": "b", "domain": "math"}\n')
    prompts = {"path": str(tmp_path / "lines.jsonl"), "max_prompt_length": 10, "max_response_length": 6}
    told = {**prompts, "teacher_context": "{completion}", "max_teacher_prompt_length": 40}
    for by in (BY_FIELD, MIXED):
        without, told_so = (several(by, data={"prompts": one})[1] for one in (prompts, told))
        (longer,), (shorter,) = told_so.work.scorings, without.work.scorings
        assert (shorter.length_of("teacher"), longer.length_of("teacher")) == (15, 45)
        held = [
            stage.simulation.phases["scoring"].most("activations") / stage.work.scorings[0].length_of("teacher")
            for stage in (without, told_so)
        ]
        assert held[1] == pytest.approx(held[0], rel=0.2)
        assert told_so.speed.scoring_flops > 2.9 * without.speed.scoring_flops


def test_each_of_them_looks_at_the_pictures(tmp_path):
    record = {"prompt": "what?", "completion": "this", "image": "nowhere.png", "domain": "math"}
    (tmp_path / "seen.jsonl").write_text(json.dumps(record) + "\n")
    path = str(save_seeing("llava", tmp_path / "llava"))
    prompts = {"type": "jsonl", "path": str(tmp_path / "seen.jsonl"), "max_prompt_length": 40, "max_response_length": 8}
    document = {"output_dir": str(tmp_path / "run"), "student": {"path": path}, "data": {"prompts": prompts}, "method": KD,
                "train": {"max_steps": 1, "per_device_train_batch_size": 4}}  # fmt: skip
    stages = []
    for keys in (
        {"teacher": {"path": path}},
        {"teachers": {"math": {"path": path}, "chat": {"path": path}}, "teachers_by": MIXED},
    ):
        (tmp_path / "recipe.yaml").write_text(json.dumps({**document, **keys}))
        stages.append(planned(tmp_path / "recipe.yaml"))
    one, both = stages
    assert both.simulation.shown.count == 1
    assert both.simulation.teacher.pictures == 2 * one.simulation.teacher.pictures > 0
    assert both.speed.scoring_flops == pytest.approx(2 * one.speed.scoring_flops)
    assert both.simulation.phases["scoring"].most("activations") >= 4 * 3 * 28 * 28 * 4


def test_advice_names_the_keys_of_all(several):
    from minillm.planning.advice import _candidates

    path, _ = several(MIXED)
    from minillm.config.loader.run_plan import load_run

    found = [keys for keys, _ in _candidates(load_run([path]).stages[0].config, "update", 1)]
    assert ["teachers.chat.dtype=bfloat16"] in found
    assert ["teachers_by.in_memory=one"] in found
    assert {"teachers.math.quantization=nf4", "teachers.chat.quantization=nf4"} in map(set, found)
