"""What is read of a run's folder: its records, stage by stage, and the keys that it ran with."""

import json

import pytest
import yaml

from minillm import UserError
from minillm.reporting.run_files import read_run, stage_label
from minillm.storage.checkpoint import TRAINER_STATE
from tests.reporting.made_up import ARMS, DOCUMENT, Run, arms, resolved, rows


def test_stages_in_order_with_what_their_students_came_from(tmp_path):
    run = read_run(arms(tmp_path / "run").folder)
    warmup, minillm, kd = run.stages.values()
    assert (kd.name, kd.parent, kd.timed_by) == ("kd", "warmup", "minillm")
    assert run.lineage(kd) == [warmup] and run.lineage(warmup) == []
    assert (minillm.steps, minillm.seconds, minillm.tokens) == (4, 120.0, 400)
    assert run.before(kd) == warmup.evaluations[-1] and run.before(warmup) == warmup.evaluations[0]
    assert stage_label("run", run, kd) == "run: kd"


def test_a_run_keeps_the_defaults_that_it_ran_with(tmp_path):
    """Those of an older version, which today's configuration would fill in otherwise."""
    run = Run(tmp_path / "run", {**DOCUMENT, "stages": {"early": {}, "late": {}, "never": {}}})
    run.train("early", 1)
    run.train("late", 1)
    run.checkpoint("late", {"early": resolved(method={"gamma": 0.5})}, train={"adam_beta2": 0.5, "weight_decay": 0.5})
    stages = read_run(run.folder).stages
    assert stages["early"].settings["method"]["gamma"] == 0.5
    assert stages["late"].settings["train"]["adam_beta2"] == 0.5
    assert stages["never"].settings == DOCUMENT  # it has not begun: as it was written
    table = rows(run.report(), "## Configuration")
    assert table["`train.adam_beta2`"] == {"default": "0.95", "early": "0.95", "late": "0.5", "never": "0.95"}
    assert table["`method.gamma`"] == {"default": "1.0", "early": "0.5", "late": "1.0", "never": "1.0"}


def test_a_default_that_is_another_one_today_is_no_difference_between_runs_of_one_version(tmp_path):
    folders = []
    for name in ("one", "two"):
        run = Run(tmp_path / name, DOCUMENT)
        run.checkpoint("main", train={"adam_beta2": 0.5})
        folders.append(run.folder)
    assert read_run(folders[0]).stages["main"].settings == read_run(folders[1]).stages["main"].settings


@pytest.mark.parametrize("content", ["{", "[]", '{"progress": {}}', None])
def test_a_checkpoint_that_cannot_be_read_is_passed_over(tmp_path, content):
    run = Run(tmp_path / "run", DOCUMENT)
    run.checkpoint("main", train={"adam_beta2": 0.5})
    damaged = run.folder / "checkpoint-7" / TRAINER_STATE
    damaged.parent.mkdir(parents=True)
    if content is not None:
        damaged.write_text(content)
    assert read_run(run.folder).stages["main"].settings["train"]["adam_beta2"] == 0.5


def test_records_of_a_stage_that_is_not_configured_any_more_are_kept(tmp_path):
    run = arms(tmp_path / "run")
    stages = {"warmup": ARMS["stages"]["warmup"]}
    (run.folder / "config.yaml").write_text(yaml.safe_dump({**ARMS, "stages": stages}))
    found = read_run(run.folder).stages
    assert list(found) == ["warmup", "minillm", "kd"] and found["kd"].settings == {} and found["kd"].steps == 12


def test_files_that_are_no_mappings_are_named(tmp_path):
    run = Run(tmp_path / "run", DOCUMENT)
    (run.folder / "env.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="env.json does not hold keys and values"):
        read_run(run.folder)
