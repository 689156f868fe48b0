"""The report of made-up runs: what it says must come from the records."""

import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from minillm.reporting.report import compare_reports, write_report
from minillm.storage.metrics_log import MetricsLog


class Run:
    """Writes a run's files as the trainer does."""

    def __init__(self, folder: Path, document: dict):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
        self.folder, self.log, self.step = folder, MetricsLog(folder), 0

    def train(self, stage: str, steps: int, *, seconds: float = 1.0, **values) -> None:
        for stage_step in range(1, steps + 1):
            self.step += 1
            self.log.write(
                {"kind": "train", "stage": stage, "step": self.step, "stage_step": stage_step,
                 "seconds": seconds * stage_step, "student_tokens": 100 * stage_step, "loss": 2.0, **values}
            )  # fmt: skip

    def evaluate(self, stage: str, stage_step: int, *, seconds: float = 0.0, who: str = "student", **metrics) -> None:
        self.log.write(
            {"kind": "eval", "stage": stage, "step": self.step, "stage_step": stage_step, "seconds": seconds,
             "student_tokens": 0, "who": who, "sets": {"dolly": metrics}, "mean": metrics}
        )  # fmt: skip

    def sample(self, stage: str, answer: str, **values) -> None:
        self.log.sample(
            {"stage": stage, "step": self.step, "set": "dolly", "index": 0, "prompt": "What?", "answer": answer,
             "length_tokens": 3, "ended": True, **values}
        )  # fmt: skip

    def report(self) -> str:
        return write_report(self.folder).read_text()


@pytest.fixture
def picture():
    """Asked for by the tests that need curves.png; the others do without, for they would spend their time on it."""


@pytest.fixture(autouse=True)
def text_alone(request, monkeypatch):
    if "picture" not in request.fixturenames:
        monkeypatch.setattr("minillm.reporting.report.draw_run", lambda run, path: False)


DOCUMENT = {
    "output_dir": "runs/x",
    "student": {"path": "models/small"},
    "teacher": {"path": "models/large"},
    "method": {"name": "minillm"},
    "train": {"max_steps": 4},
    "eval": {"sets": {"dolly": {"path": "d.jsonl"}}},
}
ARMS = {
    **DOCUMENT,
    "stages": {
        "warmup": {"method": {"name": "sft"}, "train": {"max_steps": 2}},
        "minillm": {"student": {"path": "stage:warmup"}},
        "kd": {
            "student": {"path": "stage:warmup"},
            "method": {"name": "kd"},
            "train": {"max_steps": None, "max_seconds": "stage:minillm"},
        },
    },
}


def arms(folder: Path, **document) -> Run:
    """Two stages of equal time from the same student."""
    run = Run(folder, {**ARMS, **document})
    run.evaluate("warmup", 0, reverse_kl_nats=3.5, forward_kl_nats=2.5, entropy_nats=3.0, rouge_l=8.0, ended_share=0.5)
    run.evaluate("warmup", 0, who="teacher", rouge_l=27.6, entropy_nats=1.2)
    run.train("warmup", 2)
    run.evaluate("warmup", 2, seconds=2.0, reverse_kl_nats=1.6, forward_kl_nats=1.3, entropy_nats=2.0, rouge_l=18.0)
    run.train("minillm", 4, seconds=30.0)
    run.evaluate("minillm", 4, seconds=120.0, reverse_kl_nats=0.5, forward_kl_nats=1.25, entropy_nats=1.5, rouge_l=21.0)
    run.train("kd", 12, seconds=10.0)
    run.evaluate("kd", 12, seconds=120.0, reverse_kl_nats=0.8, forward_kl_nats=1.0, entropy_nats=1.9, rouge_l=19.5)
    return run


def rows(report: str, heading: str = "## Evaluation") -> dict[str, dict[str, str]]:
    """The first table after a heading, as {row: {column: cell}}."""
    section = report.split(f"{heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, re.MULTILINE).group().splitlines()
    header, _, *body = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {line[0]: dict(zip(header[1:], line[1:], strict=True)) for line in body}


def test_the_table_has_the_numbers_of_the_records(tmp_path):
    table = rows(arms(tmp_path / "run").report())
    assert list(table) == ["before warmup", "after warmup", "after minillm", "after kd", "teacher"]
    assert table["before warmup"] == {
        "Reverse KL (nats/token) ↓": "3.50",
        "Forward KL (nats/token) ↓": "2.50",
        "Entropy (nats/token)": "3.00",
        "Rouge-L (F1 × 100) ↑": "8.00",
        "Answers that end (%)": "50.0%",
        "Training time": "–",
    }
    assert table["after minillm"]["Reverse KL (nats/token) ↓"] == "0.500"
    assert table["after minillm"]["Training time"] == "2 min 00 s"
    assert table["teacher"]["Rouge-L (F1 × 100) ↑"] == "27.6"
    assert table["teacher"]["Reverse KL (nats/token) ↓"] == "–"


def test_equal_time_gets_a_verdict_with_the_ratios(tmp_path):
    report = arms(tmp_path / "run").report()
    (verdict,) = [line for line in report.splitlines() if line.startswith("**minillm against kd")]
    assert "minillm: 2 min 00 s, 4 steps, 400 student tokens; kd: 2 min 00 s, 12 steps, 1,200 student tokens" in verdict
    assert "minillm is ahead in Reverse KL and Rouge-L. kd is ahead in Forward KL." in verdict
    assert "Reverse KL 0.500 to 0.800 nats/token (ratio 0.625)" in verdict
    assert "Forward KL 1.25 to 1.00 nats/token (ratio 1.25)" in verdict
    assert "Rouge-L 21.0 to 19.5 (+1.50)" in verdict
    assert "One evaluation seed" in verdict


def test_no_verdict_between_stages_that_start_from_different_students(tmp_path):
    stages = {**ARMS["stages"], "kd": {**ARMS["stages"]["kd"], "student": {"path": "models/small"}}}
    assert "against kd" not in arms(tmp_path / "run", stages=stages).report()


def test_a_difference_within_the_deviation_over_seeds_is_level(tmp_path):
    run = arms(tmp_path / "run")
    run.evaluate("minillm", 4, rouge_l=21.0, rouge_l_std=1.0, loss_nats=2.0, loss_nats_std=0.01)
    run.evaluate("kd", 12, rouge_l=20.0, rouge_l_std=1.0, loss_nats=1.9, loss_nats_std=0.01)
    report = run.report()
    assert "kd is ahead in Loss on references. They are level in Rouge-L." in report
    assert "Rouge-L 21.0 ± 1.0 to 20.0 ± 1.0 (+1.00)" in report
    assert rows(report)["after kd"]["Rouge-L (F1 × 100) ↑"] == "20.0 ± 1.0"


COLLAPSE = {"reverse_kl_nats": 0.3, "forward_kl_nats": 2.0, "entropy_nats": 0.1}


@pytest.mark.parametrize(
    ("end", "warned"),
    [
        (COLLAPSE, True),
        ({**COLLAPSE, "reverse_kl_nats": 1.7}, False),  # it did not fall
        ({**COLLAPSE, "forward_kl_nats": 1.3}, False),  # it did not rise
        ({**COLLAPSE, "entropy_nats": 1.5}, False),  # it is still there
        ({"reverse_kl_nats": 0.3}, False),  # not known
    ],
)
def test_collapse_is_warned_of(tmp_path, end, warned):
    run = Run(tmp_path / "run", DOCUMENT)
    run.evaluate("main", 0, reverse_kl_nats=1.6, forward_kl_nats=1.3, entropy_nats=2.0)
    run.train("main", 4)
    run.evaluate("main", 4, **end)
    report = run.report()
    assert ("looks collapsed" in report) == warned
    if warned:
        assert "from 1.60 to 0.300 nats a token" in report and "entropy fell from 2.00 to 0.100" in report


def test_a_stage_is_compared_with_what_its_student_was_before_it(tmp_path):
    run = arms(tmp_path / "run")
    run.evaluate("kd", 12, **{**COLLAPSE, "forward_kl_nats": 1.5})  # above warmup's last 1.3, below its first 2.5
    assert "Warning: kd looks collapsed" in run.report()


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
        "**kd**": {"text": r"kd's \*answer\* *(cut at the token limit)*"},
        "teacher": {"text": "Teacher's *(cut at the token limit)*"},
    }


def test_stages_with_their_speed_memory_and_best_evaluation(tmp_path):
    run = Run(tmp_path / "run", {**DOCUMENT, "eval": {**DOCUMENT["eval"], "metric": "reverse_kl_nats"}})
    run.train("main", 1, seconds=9.0, **{"memory/peak_gib": 1.5})
    run.train("main", 4, seconds=0.5, **{"memory/peak_gib": 1.25, "memory/planned_peak_gib": 1.75})
    for step, value in ((1, 3.0), (2, 1.0), (4, 2.0)):
        run.evaluate("main", step, reverse_kl_nats=value)
    stage = rows(run.report(), "## Stages")["main"]
    assert stage["time a step"] == "0.500 s"
    assert stage["tokens a second"] == "200"
    assert (stage["peak memory (GiB)"], stage["planned (GiB)"]) == ("1.50", "1.75")
    assert stage["best evaluation"] == "Reverse KL 1.00 at step 2"
    assert stage["method"] == DOCUMENT["method"]["name"]


def test_a_stage_trained_through_lora_says_so(tmp_path):
    run = Run(tmp_path / "run", {**DOCUMENT, "student": {**DOCUMENT["student"], "lora": {"r": 8, "alpha": 32}}})
    run.train("main", 1)
    report = run.report()
    assert rows(report, "## Stages")["main"]["method"].endswith(", LoRA (r 8, alpha 32, all linear layers)")
    assert rows(report, "## Configuration")["`student.lora.r`"]["main"] == "8"


def test_several_sets_have_a_table_each(tmp_path):
    run = Run(tmp_path / "run", DOCUMENT)
    run.log.write(
        {"kind": "eval", "stage": "main", "step": 0, "stage_step": 0, "seconds": 0.0, "who": "student",
         "sets": {"dolly": {"rouge_l": 10.0}, "s-ni": {"rouge_l": 20.0}}, "mean": {"rouge_l": 15.0}}
    )  # fmt: skip
    report = run.report()
    headings = ("## Evaluation", "### dolly", "### s-ni")
    found = [rows(report, heading)["before main"]["Rouge-L (F1 × 100) ↑"] for heading in headings]
    assert found == ["15.0", "10.0", "20.0"]


def test_stages_that_begin_with_one_student_share_its_row(tmp_path):
    run = Run(tmp_path / "run", {**DOCUMENT, "stages": {"a": {}, "b": {}}})
    for stage in ("a", "b"):
        run.evaluate(stage, 0, rouge_l=8.0)
        run.train(stage, 2)
        run.evaluate(stage, 2, rouge_l=9.0)
    assert list(rows(run.report())) == ["before a, b", "after a", "after b"]


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


def test_the_picture_is_a_picture_whatever_the_numbers(tmp_path, picture):
    run = arms(tmp_path / "run")
    run.evaluate("kd", 12, reverse_kl_nats=float("inf"), forward_kl_nats=float("nan"), rouge_l=20.0)
    run.report()
    with Image.open(run.folder / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000 and len(picture.convert("L").getcolors()) > 20
    assert not list(run.folder.glob(".*"))


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


def test_runs_that_differ_in_their_seed_have_means_and_deviations(tmp_path):
    for seed, rouge in ((1, 10.0), (2, 14.0), (3, 12.0)):
        run = Run(tmp_path / f"run-{seed}", {**DOCUMENT, "seed": seed, "output_dir": f"run-{seed}"})
        run.train("main", 4)
        run.evaluate("main", 0, rouge_l=1.0, reverse_kl_nats=5.0)
        run.evaluate("main", 4, seconds=2.0 * seed, rouge_l=rouge)
    folders = [tmp_path / f"run-{seed}" for seed in (1, 2, 3)]
    text = compare_reports(folders)
    table = rows("## Evaluation\n" + text.partition("## Over seeds\n")[2].partition("## Each run")[0])
    assert list(table) == ["before main", "after main"]
    assert table["before main"]["Rouge-L (F1 × 100) ↑"] == "1.00"
    assert table["after main"]["Rouge-L (F1 × 100) ↑"] == "12.0 ± 2.0" and "4.00 s" in table["after main"].values()
    assert "Over seeds" not in compare_reports([folders[0], folders[0]])  # one seed twice
    (tmp_path / "run-3" / "config.yaml").write_text(yaml.safe_dump({**DOCUMENT, "train": {"max_steps": 9}}))
    assert "Over seeds" not in compare_reports(folders)


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
