"""The benchmark of a whole update: our trainer really runs, and what is written is what was measured."""

import csv

from minillm.benchmarks.step import COLUMNS, Case, Row, _ratio, main

TINY = ["--threads", "1", "--match", "128x2", "--vocab", "300", "--answers", "2", "--tokens", "3", "--prompt-tokens", "4"]


def test_our_trainer_is_measured_and_a_missing_one_is_named(tmp_path, capfd):
    assert main([*TINY, "--updates", "2", "--repeats", "1", "--trainers", "minillm", "--output", str(tmp_path)]) == 0
    header, *rows = csv.reader((tmp_path / "step.csv").open())
    assert tuple(header) == COLUMNS and len(rows) == 1
    row = dict(zip(header, rows[0], strict=True))
    assert (row["trainer"], row["student"], row["teacher"], row["ratio"]) == ("minillm", "128x2", "256x4", "")
    assert abs(float(row["tokens_per_s"]) * float(row["median_s"]) / (2 * 3) - 1) < 0.2  # both are rounded
    assert float(row["peak_mib"]) > 1
    assert "| 128x2 | 256x4 |" in (tmp_path / "step.md").read_text()


def test_the_ratio_is_of_tokens_a_second_on_the_same_models_and_epochs():
    mine = Row(Case((8, 1), (8, 2), 4, alpha=0.2), "minillm", [1.0, 2.0, 9.0], 1, 100)
    theirs = Row(Case((8, 1), (8, 2), 4), "trl", [4.0], 1, 100)
    other = Row(Case((8, 1), (8, 2), 1), "trl", [1.0], 1, 100)
    assert _ratio(mine, [other, theirs, mine]) == "2.00"
    assert _ratio(mine, [other, mine]) == ""


def test_an_unknown_case_is_an_error(capsys):
    assert main(["--match", "nothing like this"]) == 2
    assert "256x4 from 512x8" in capsys.readouterr().err
