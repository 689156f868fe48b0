"""Runs whose teachers are told more of prompts with pictures: one, and several of which one is in memory at a time."""

import json

import pytest
import torch
import yaml

from minillm.teachers.local import LocalTeacher
from tests.pictures import picture, save_seeing
from tests.runs import records, train


@pytest.mark.parametrize(
    "method", [{"name": "kd"}, {"name": "minillm", "alpha": 0.0, "lm_coef": 0.0}], ids=["kd", "minillm"]
)
def test_teachers_that_are_told_more_see_the_pictures_of_the_prompt(method, tmp_path, monkeypatch):
    """Twice the same teacher with weights is that teacher, and in turn they are both of them at once, bit for bit."""
    seen, rows = [], LocalTeacher.rows

    def asked(teacher, batch):
        seen.extend(batch.sequences)
        return rows(teacher, batch)

    monkeypatch.setattr(LocalTeacher, "rows", asked)
    lines = []
    for number in range(3):
        picture(number).save(tmp_path / f"{number}.png")
        record = {"prompt": "what?", "completion": "a cat", "image": f"{number}.png", "hint": "h" * (number + 1)}
        lines.append(json.dumps(record))
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    prompts = {"type": "jsonl", "path": str(tmp_path / "data.jsonl"), "template": "chat", "teacher_context": "hint",
               "max_prompt_length": 64, "max_response_length": 4}  # fmt: skip
    teacher = {"path": str(save_seeing("llava", tmp_path / "teacher", width=48, seed=1))}
    document = {
        "seed": 5,
        "student": {"path": str(save_seeing("llava", tmp_path / "student"))},
        "data": {"prompts": prompts},
        "rollout": {"buffer_size": 2, "batch_size": 2, "max_new_tokens": 3},
        "method": method,
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
        "log": {"report_to": []},
        "save": {"best": False},
    }
    both = {"teachers": {"a": teacher, "b": teacher}}
    runs = {
        "one": {"teacher": teacher},
        "both": {**both, "teachers_by": {"weights": {"a": 1, "b": 3}}},
        "in turn": {**both, "teachers_by": {"weights": {"a": 1, "b": 3}, "in_memory": "one"}},
    }
    found = {}
    for name, keys in runs.items():
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({**document, **keys, "output_dir": str(tmp_path / name)}, sort_keys=False))
        train(path)
        found[name] = records(tmp_path / name)
    assert found["in turn"] == found["both"]
    for one, several in zip(found["one"], found["both"], strict=True):
        for key in ("loss", "grad_norm"):
            assert several[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6)
    assert seen
    for text in seen:
        assert len(text.teacher_prompt) > len(text.prompt)
        assert torch.equal(text.extras["pixel_values"], text.read_by_teacher().extras["pixel_values"])
