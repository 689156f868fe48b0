"""The pictures of an experiment, down to the points of their lines and bars."""

import pytest

from minillm.experiment import figures
from minillm.experiment.figures import draw_curves, draw_ends
from minillm.experiment.results import read_results


@pytest.fixture
def panels(monkeypatch):
    """Draw with one of the functions; the panels of its picture by their titles."""

    def draw(function, *arguments, **options):
        found = {}

        def keep(keys, panel_of, path, **_):
            from minillm.reporting.panels import grid

            figure, places = grid(len(keys))
            for panel, key in zip(places, keys, strict=True):
                panel_of(panel, key)
                found[key] = panel
            return bool(keys)

        monkeypatch.setattr(figures, "draw_panels", keep)
        function(*arguments, None, **options)
        return found

    return draw


@pytest.fixture
def results(folders):
    """Two seeds of one arm, evaluated twice and once more by one of them; an arm that was only measured."""
    for seed, (first, last) in {1: (3.0, 2.0), 2: (5.0, 3.0)}.items():
        folders.measured("sft", seed, teacher="t", loss_nats=last)
        more = {300: 9.0} if seed == 2 else {}
        folders.trained("sft", seed, seconds=60.0, evaluations={0: first, 100 * seed: last, **more})
    folders.measured("start", 1, loss_nats=4.0)
    folders.teacher("t", loss_nats=1.0)
    return read_results(folders.experiment, folders.output, [1, 2])


def test_curves_are_means_of_the_evaluations_that_all_seeds_have(panels, results):
    drawn = panels(draw_curves, results, ["loss_nats", "rouge_l", "student_tokens"])
    assert list(drawn) == ["loss_nats"]  # of the others there is no curve
    (line,) = drawn["loss_nats"].lines
    assert line.get_label() == "sft"
    assert list(line.get_xdata()) == [0.0, 150.0] and list(line.get_ydata()) == [4.0, 2.5]


def test_curves_over_time_have_the_same_values_at_their_seconds(panels, results):
    (line,) = panels(draw_curves, results, ["loss_nats"], along="seconds")["loss_nats"].lines
    assert list(line.get_xdata()) == [0.0, 1.5] and list(line.get_ydata()) == [4.0, 2.5]


def test_ends_are_bars_with_a_dot_for_each_seed_and_the_teacher(panels, results):
    panel = panels(draw_ends, results, ["loss_nats", "rouge_l"])["loss_nats"]
    assert sorted(bar.get_width() for bar in panel.patches) == [2.5, 4.0]
    dots = [tuple(line.get_xdata()) for line in panel.lines if line.get_marker() == "."]
    assert sorted(dots) == [(2.0, 3.0), (4.0,)]
    assert [1.0, 1.0] in [list(line.get_xdata()) for line in panel.lines]  # the teacher's
    assert [label.get_text() for label in panel.get_yticklabels()] == ["start", "sft"]


def test_nothing_to_draw_is_no_picture(folders, tmp_path):
    nothing = read_results(folders.experiment, folders.output, [1])
    assert not draw_curves(nothing, ["loss_nats"], tmp_path / "a.png")
    assert not draw_ends(nothing, ["loss_nats"], tmp_path / "b.png") and not list(tmp_path.glob("*.png"))
