"""The measurements of an experiment have all arms asked the same, on all days."""

import json
from datetime import datetime
from types import SimpleNamespace

import pytest

from minillm import UserError
from minillm.experiment import measuring
from minillm.experiment.experiment_file import load_experiment
from minillm.experiment.jobs import plan_jobs
from minillm.experiment.measuring import STARTED, Measuring, kept_start
from minillm.models.tokenizers import BYTE_TEMPLATE, byte_tokenizer
from minillm.train.model_cache import ModelCache
from tests.runs import Silent


@pytest.fixture
def on(monkeypatch):
    def on_day(day: int) -> None:
        clock = type("Clock", (datetime,), {"now": classmethod(lambda cls, tz=None: datetime(2026, 3, day, 12))})
        monkeypatch.setattr(measuring, "datetime", clock)

    return on_day


def test_an_experiment_began_with_its_first_run(tmp_path, on):
    for day, name in ((5, "kd"), (4, "sft"), (6, "gkd")):
        (tmp_path / "seed-1" / name).mkdir(parents=True)
        (tmp_path / "seed-1" / name / "env.json").write_text(json.dumps({"started": f"2026-02-0{day}T10:00:00+0000"}))
    on(9)
    assert f"{kept_start(tmp_path):%Y-%m-%d}" == "2026-02-04"
    (tmp_path / STARTED).write_text("yesterday\n")
    with pytest.raises(UserError, match=rf"{STARTED} holds no time"):
        kept_start(tmp_path)


def test_prompts_are_of_one_day(write, document, tmp_path, on):
    """Also where no arm is trained, and other processes measure the other arms."""
    document["evaluation"]["sets"]["held_out"]["template"] = "chat"
    document["evaluation"]["sets"]["held_out"]["max_prompt_length"] = 64
    experiment = load_experiment(write(), [])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + BYTE_TEMPLATE
    models = SimpleNamespace(tokenizer=tokenizer)
    for day in (3, 4):
        on(day)
        evaluator, _ = Measuring(experiment, tmp_path, ModelCache())._load_evaluators(models, None, Silent())
        assert evaluator.sets["held_out"].examples[0].prompt.startswith("03 Mar 2026")


def test_an_arm_is_measured_on_what_its_teacher_reads_alike(write, document, tmp_path, monkeypatch):
    experiment = load_experiment(write(), [])

    def refuse(name, ids):
        raise UserError(f"{name}: {len(list(ids))} texts")

    models = SimpleNamespace(tokenizer=byte_tokenizer(), require_shared=refuse)
    student = SimpleNamespace(path="student")
    monkeypatch.setattr(Measuring, "_configs", lambda self, job: (student, None))
    monkeypatch.setattr(Measuring, "_open", lambda *arguments: (models, []))
    monkeypatch.setattr(measuring, "LocalRollouts", lambda models, **options: None)
    job = next(one for one in plan_jobs(experiment, tmp_path, [1], experiment.arms) if one.measured)
    with pytest.raises(UserError, match="^evaluation.sets.held_out: "):
        Measuring(experiment, tmp_path, ModelCache()).measure(job, Silent())
