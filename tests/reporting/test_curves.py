"""The picture of a run: which panels it has, and that it is drawn whatever the numbers are."""

from typing import ClassVar, Literal

import pytest
from PIL import Image

from minillm.config.method import MethodConfig
from minillm.config.needs import Needs, TermNeeds
from tests.reporting.made_up import DOCUMENT, Run, arms
from tests.runs import panels


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


def tempered_run(folder, method: str) -> Run:
    run = Run(folder, {**DOCUMENT, "method": {"name": method}})
    run.train("main", 3, **{"tempered/temperature": 0.25, "reverse_kl_nats": 2.0})
    return run


def test_a_method_brings_panels_of_its_own(tmp_path, registered):
    registered(Tempered)
    found = panels(tempered_run(tmp_path / "run", "tempered").folder)
    assert list(found) == ["Reverse KL", "Temperature", "Training loss"]
    (line,) = found["Temperature"]
    assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == [0.25] * 3


@pytest.mark.parametrize("method", ["tempered", "minillm"])
def test_other_methods_do_without(tmp_path, method):
    """Whether they are known here or not: nothing is drawn of metrics that no one declared."""
    assert list(panels(tempered_run(tmp_path / "run", method).folder)) == ["Reverse KL", "Training loss"]


def test_stages_are_drawn_one_after_the_other(tmp_path):
    """A stage begins where the one that its student came from ended: warmup has 2 steps."""
    run = arms(tmp_path / "run", stages={"warmup": {"method": {"name": "sft"}, "train": {"max_steps": 2}},
                                         "minillm": {"student": {"path": "stage:warmup"}}})  # fmt: skip
    losses = panels(run.folder)
    ends = [line.get_xdata()[-1] for line in losses["Reverse KL"] if len(line.get_xdata()) > 1]
    assert 2 in ends and 6 in ends


def test_stages_of_equal_time_are_drawn_over_time(tmp_path):
    """kd has as long as minillm, so that the axis is of seconds: 2 of warmup and 120 of each."""
    found = panels(arms(tmp_path / "run").folder)
    axes = {line.axes.get_xlabel() for line in found["Reverse KL"]}
    assert axes == {"training time (s)"}
    assert max(line.get_xdata()[-1] for line in found["Reverse KL"]) == 122
