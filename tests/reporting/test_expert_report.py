"""The load of experts in the report: a picture, and a table of its beginning and its end."""

import pytest
from matplotlib.figure import Figure
from PIL import Image

from minillm.reporting import expert_report, report
from tests.reporting.made_up import DOCUMENT, Run, rows

FIRST, LAST = [[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], [[0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1]]


@pytest.fixture(autouse=True)
def _without_curves(monkeypatch):
    monkeypatch.setattr(report, "draw_run", lambda run, path: False)


def test_the_report_shows_who_got_how_much(tmp_path):
    run = Run(tmp_path / "run", DOCUMENT)
    run.train("main", 3, expert_load=FIRST)
    run.train("main", expert_report.LAST, expert_load=LAST)
    text = run.report()
    assert "![Load of the experts](experts.png)" in text
    found = rows(text, "## Experts")["main"]
    assert [found[key] for key in ("layers with experts", "experts in each", "smallest share", "largest share")] == [
        "2", "4", "10.0%", "40.0%"
    ]  # fmt: skip
    # ln 2 and 0 at first; ln 4 and 1.280 at the end
    assert [found[key] for key in ("entropy at first (nats)", "entropy at the end", "with equal shares")] == [
        "0.347", "1.33", "1.39"
    ]  # fmt: skip
    with Image.open(run.folder / "experts.png") as picture:
        assert picture.format == "PNG" and len(picture.convert("L").getcolors()) > 20


def test_the_picture_has_the_shares_of_the_end_and_the_entropy_of_every_step(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        expert_report, "draw_panels",
        lambda keys, draw, path: [draw(drawn.setdefault(key, Figure().subplots()), key) for key in keys],
    )  # fmt: skip
    run = Run(tmp_path / "run", DOCUMENT)
    run.train("main", 2, expert_load=LAST)
    run.report()
    end, entropy = drawn.values()
    assert end.images[0].get_array().tolist() == [pytest.approx([100 * one for one in row]) for row in LAST]
    mean, least, even = entropy.lines
    assert list(mean.get_xdata()) == [1, 2] and list(mean.get_ydata()) == pytest.approx([1.33308] * 2, abs=1e-4)
    assert list(least.get_ydata()) == pytest.approx([1.27985] * 2, abs=1e-4)
    assert even.get_ydata()[0] == pytest.approx(1.38629, abs=1e-4)


def test_a_dense_student_has_no_such_section(tmp_path):
    run = Run(tmp_path / "run", DOCUMENT)
    run.train("main", 2)
    assert "Experts" not in run.report() and not (run.folder / "experts.png").exists()
