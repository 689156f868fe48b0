"""The report of made-up runs: what it says must come from the records."""

import json
import re

import pytest

from minillm.reporting.report import compare_reports, write_report
from tests.reporting.made_up import DOCUMENT, Run, arms, rows


def test_samples_stand_side_by_side_and_only_the_last_of_each_stage(tmp_path):
    run = arms(tmp_path / "run")
    run.sample("warmup", "first words")
    run.sample("warmup", "a | warm answer", reference="Right.", teacher="Teacher's.", teacher_ended=True)
    run.sample("kd", "kd's *answer*", reference="Right.", teacher="Teacher's", teacher_ended=False, ended=False)
    table = rows(run.report(), "### dolly 1")
    assert table == {
        "prompt": {"text": "What?"},
        "reference": {"text": "Right."},
        "**warmup**": {"text": r"a \| warm answer"},
        "**kd**": {"text": r"kd's \*answer\* *(ends at the token limit)*"},
        "teacher": {"text": "Teacher's *(ends at the token limit)*"},
    }


def test_stages_with_their_speed_memory_and_best_evaluation(tmp_path):
    run = Run(tmp_path / "run", {**DOCUMENT, "eval": {**DOCUMENT["eval"], "metric": "reverse_kl_nats"}})
    run.train("main", 1, seconds=9.0, **{"memory/peak_gib": 1.5})
    run.train("main", 4, seconds=0.5, **{"memory/peak_gib": 1.25, "memory/planned_peak_gib": 1.75})
    for step, value in ((1, 3.0), (2, 1.0), (4, 2.0)):
        run.evaluate("main", step, reverse_kl_nats=value)
    stage = rows(run.report(), "## Stages")["main"]
    assert stage["time per step"] == "0.500 s"
    assert stage["tokens per second"] == "200"
    assert (stage["peak memory (GiB)"], stage["planned (GiB)"]) == ("1.50", "1.75")
    assert stage["best evaluation"] == "Reverse KL 1.00 at step 2"
    assert stage["method"] == DOCUMENT["method"]["name"]


def test_a_stage_trained_through_lora_says_so(tmp_path):
    run = Run(tmp_path / "run", {**DOCUMENT, "student": {**DOCUMENT["student"], "lora": {"r": 8, "alpha": 32}}})
    run.train("main", 1)
    report = run.report()
    assert rows(report, "## Stages")["main"]["method"].endswith(", LoRA (r 8, alpha 32, all linear layers)")
    assert rows(report, "## Configuration")["`student.lora.r`"]["main"] == "8"


def test_a_run_that_has_only_started(tmp_path, picture):
    run = Run(tmp_path / "run", DOCUMENT)
    report = run.report()
    assert "nothing has been measured yet" in report and "curves.png" not in report
    assert not (run.folder / "curves.png").exists()
    run.evaluate("main", 0, rouge_l=8.0)
    assert list(rows(run.report())) == ["before main"]
    run.train("main", 3)
    report = run.report()
    assert "not finished: stage main, step 3 of 4" in report and "curves.png" in report
    run.evaluate("main", 2, rouge_l=9.0)
    assert list(rows(run.report())) == ["before main", "main, step 2"]


def test_a_run_without_evaluation_sets(tmp_path, picture):
    run = Run(tmp_path / "run", {**DOCUMENT, "eval": {}})
    run.train("main", 4, **{"loss/policy": 1.0, "loss/pretraining": 1.0})
    (run.folder / "final").mkdir()
    report = run.report()
    assert "no `eval.sets`" in report and "finished" in report
    assert (run.folder / "curves.png").exists()


def test_environment_and_versions(tmp_path):
    run = Run(tmp_path / "run", DOCUMENT)
    environment = {"versions": {"torch": "2.13"}, "system": "Linux", "gpu": "H100", "cpus": 8, "cpu_threads": 4}
    (run.folder / "env.json").write_text(json.dumps(environment))
    report = run.report()
    assert "torch 2.13" in report and "Linux; H100; CPUs: 8, threads used: 4" in report


def test_comparison_of_runs(tmp_path, picture):
    arms(tmp_path / "one" / "run")
    run = Run(tmp_path / "two" / "run", {**DOCUMENT, "train": {"max_steps": 4, "learning_rate": 0.5}})
    run.train("main", 4)
    run.evaluate("main", 4, seconds=4.0, rouge_l=11.0)
    text = compare_reports([tmp_path / "one" / "run", tmp_path / "two" / "run"], figure=tmp_path / "both.png")
    assert (tmp_path / "both.png").exists() and "(both.png)" in text
    assert text.startswith("# one/run against two/run")
    table = rows("## Evaluation\n" + text)
    assert list(table) == ["one/run: warmup", "one/run: minillm", "one/run: kd", "two/run"]
    assert table["two/run"]["Rouge-L (F1 × 100) ↑"] == "11.0"
    assert "| main: `train.learning_rate` | – | 0.5 |" in text


@pytest.mark.parametrize("content", [None, "- a list", "a: [unclosed"])
def test_what_is_not_a_run_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)


def test_where_the_time_went_is_shares_of_what_was_measured(tmp_path):
    run = Run(tmp_path / "run", DOCUMENT)
    run.train("main", 2, **{"time/rollout_s": 30.0, "time/update_s": 15.0})
    text = run.report()
    assert "| stage | rollout | update |" in text and "| main | 1 min 00 s (67%) | 30.0 s (33%) |" in text
