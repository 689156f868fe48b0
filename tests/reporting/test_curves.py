"""The picture of a run: which panels it has, and that it is drawn whatever the numbers are."""

from typing import ClassVar, Literal

import pytest
from PIL import Image

from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, TermNeeds
from minillm.reporting import curves
from minillm.reporting.run_files import read_run
from tests.reporting.made_up import DOCUMENT, Run, arms


def test_the_picture_is_a_picture_whatever_the_numbers(tmp_path, picture):
    run = arms(tmp_path / "run")
    run.evaluate("kd", 12, reverse_kl_nats=float("inf"), forward_kl_nats=float("nan"), rouge_l=20.0)
    run.report()
    with Image.open(run.folder / "curves.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000 and len(picture.convert("L").getcolors()) > 20
    assert not list(run.folder.glob(".*"))


class Tempered(MethodConfig):
    """A method of elsewhere, whose temperature is worth a picture."""

    name: Literal["tempered"]
    summary: ClassVar[str] = "tempering"
    panels: ClassVar[dict[str, tuple[str, str]]] = {
        "tempered/temperature": ("Temperature", "0 to 1"),
        "tempered/never_recorded": ("Nothing", ""),
        "reverse_kl_nats": ("Reverse KL again", "nats/token"),
    }

    def needs(self) -> Needs:
        return Needs((TermNeeds("imitation", ("references",)),))


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The titles and lines of the panels that a run's picture has."""

    def draw(run: Run) -> dict[str, list]:
        found = {}

        def keep(figure, path):
            found.update(
                {panel.get_title(loc="left"): panel.lines for panel in figure.axes if panel.get_title(loc="left")}
            )

        monkeypatch.setattr(curves, "save", keep)
        curves.draw_run(read_run(run.folder), tmp_path / "curves.png")
        return found

    return draw


def tempered_run(folder, method: str) -> Run:
    run = Run(folder, {**DOCUMENT, "method": {"name": method}})
    run.train("main", 3, **{"tempered/temperature": 0.25, "reverse_kl_nats": 2.0})
    return run


def test_a_method_brings_panels_of_its_own(tmp_path, drawn, registered):
    registered(Tempered)
    panels = drawn(tempered_run(tmp_path / "run", "tempered"))
    assert list(panels) == ["Reverse KL", "Temperature", "Training loss"]
    (line,) = panels["Temperature"]
    assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == [0.25] * 3


@pytest.mark.parametrize("method", ["tempered", "minillm"])
def test_other_methods_do_without(tmp_path, drawn, method):
    """Whether they are known here or not: nothing is drawn of metrics that no one declared."""
    assert list(drawn(tempered_run(tmp_path / "run", method))) == ["Reverse KL", "Training loss"]


def test_stages_are_drawn_one_after_the_other(tmp_path, drawn):
    """A stage begins where the one that its student came from ended: warmup has 2 steps."""
    losses = drawn(arms(tmp_path / "run", stages={"warmup": {"method": {"name": "sft"}, "train": {"max_steps": 2}},
                                                  "minillm": {"student": {"path": "stage:warmup"}}}))  # fmt: skip
    ends = [line.get_xdata()[-1] for line in losses["Reverse KL"] if len(line.get_xdata()) > 1]
    assert 2 in ends and 6 in ends


def test_stages_of_equal_time_are_drawn_over_time(tmp_path, drawn):
    """kd has as long as minillm, so that the axis is of seconds: 2 of warmup and 120 of each."""
    panels = drawn(arms(tmp_path / "run"))
    axes = {line.axes.get_xlabel() for line in panels["Reverse KL"]}
    assert axes == {"training time (s)"}
    assert max(line.get_xdata()[-1] for line in panels["Reverse KL"]) == 122
