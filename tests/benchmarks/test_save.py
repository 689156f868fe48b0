"""The benchmark of saving runs a stage both ways, and takes its numbers from the records."""

from types import SimpleNamespace

import pytest
import yaml

from minillm import UserError
from minillm.benchmarks import save
from minillm.benchmarks.save import main, measure
from tests import forked


def test_a_run_is_measured_by_its_records():
    records = [
        {"seconds": 5.0, "time/scoring_s": 4.0, "time/saving_s": 9.0},
        {"seconds": 6.0, "time/scoring_s": 0.1},
        {"seconds": 7.0, "time/scoring_s": 0.1, "time/saving_s": 0.5},
        {"seconds": 8.0, "time/scoring_s": 0.1},
        {"seconds": 9.0, "time/scoring_s": 0.1, "time/saving_s": 1.5},
    ]
    found = measure(records, every=2)
    assert (found.step_seconds, found.saving_seconds) == (1.0, 1.0)
    assert (found.batches, found.steps_per_s) == (pytest.approx(0.1), pytest.approx(4 / 6))


def test_both_ways_are_in_the_table(small_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(save, "subprocess", SimpleNamespace(run=forked.run))
    document = small_run(tmp_path, layers=1)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(document))
    sizes = ["--steps", "3", "--every", "1", "--repeats", "1"]
    assert main([str(tmp_path / "run.yaml"), *sizes, "--output", str(tmp_path / "save.md")]) == 0
    page = (tmp_path / "save.md").read_text()
    assert page in capsys.readouterr().out
    waits, background = ([cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines()[2:4])
    assert (waits[0], waits[4]) == ("the run waits", "1.00")
    assert background[0] == "in the background" and float(background[4]) > 0


def test_what_cannot_be_measured_is_refused(two_stages):
    with pytest.raises(UserError, match="the stages teacher, distil; leave one: stages.distil=null"):
        main([str(two_stages)])
    with pytest.raises(UserError, match="--steps 2: more than --every 2"):
        main([str(two_stages), "--steps", "2"])
