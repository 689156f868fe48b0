"""The tables of evaluations against the records that they are made of."""

import yaml

from minillm.reporting.report import compare_reports
from tests.reporting.made_up import DOCUMENT, Run, arms, rows


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
