"""The pictures of the analyses: drawn where there is something, and of nothing no file."""

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from minillm.reporting.analysis_figures import draw_analyses

ONE = {
    "mean": {"loss_nats": 2.0, "distinct_4": 90.0, "rouge_l": 20.0, "rouge_l_0_5": 10.0, "rouge_l_6_up": "NaN"},
    "curves": {
        "exposure_bias": {"words": {"on_student": [1.0, 2.5, 4.0], "on_teacher": [1.0, 2.0, 3.0]}},
        "calibration": {"moods": {"counts": [0, 2], "confidence": [None, 0.9], "correct": [None, 0.5]}},
    },
    "vocabulary_map": {"unmapped": 1, "exact": 6, "special": 1},
}


def test_each_analysis_has_its_picture(tmp_path):
    drawn = draw_analyses({"a": [ONE, ONE], "b": [ONE], "none": []}, tmp_path / "figures", prefix="x-")
    names = ["calibration", "diversity", "exposure-bias", "length-buckets", "vocabulary-map"]
    assert sorted(path.name for path in drawn) == [f"x-{name}.png" for name in names]
    for path in drawn:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.width > 300 and len(picture.convert("L").getcolors()) > 10


@pytest.mark.parametrize("found", [{}, {"a": [{"mean": {"rouge_l": 1.0}, "curves": {}}]}])
def test_of_what_was_not_measured_there_is_none(tmp_path, found):
    (tmp_path / "diversity.png").write_bytes(b"of before")
    assert draw_analyses(found, tmp_path) == []
    assert not list(tmp_path.glob("*.png"))


def test_curves_of_several_seeds_are_averaged(tmp_path, monkeypatch):
    from minillm.reporting import analysis_figures as analyses

    lines = []
    monkeypatch.setattr(analyses, "draw_panels", lambda keys, draw, path: [draw(Panel(lines), key) for key in keys])
    other = {"curves": {"exposure_bias": {"words": {"on_student": [1.0, 3.5, 8.0], "on_teacher": [1.0, 2.0, 3.0]}}}}
    analyses.draw_exposure_bias({"a": [ONE, other]}, tmp_path / "x.png")
    (x, y), *_ = lines
    assert list(x) == [2, 3] and list(y) == pytest.approx([50.0, 100.0])


class Panel:
    """Takes what is drawn."""

    def __init__(self, lines: list):
        self.lines = lines

    def plot(self, x, y, **options):
        self.lines.append((x, y))

    def __getattr__(self, name):
        class Anything:
            def __getattr__(self, name):
                return self

            def __getitem__(self, key):
                return self

            def __call__(self, *args, **kwargs):
                return self

        return Anything()


def test_ids_of_a_kind_are_shares_of_all(tmp_path, monkeypatch):
    from minillm.reporting import analysis_figures as analyses

    panels = []
    monkeypatch.setattr(analyses, "draw_panels", lambda keys, draw, path: panels.extend(keys) or draw(axes, keys[0]))
    axes = plt.figure().subplots()
    analyses.draw_vocabulary_map({"a": [ONE], "b": [{"mean": {}}]}, tmp_path / "x.png")
    assert panels == ["vocabulary_map"]
    assert [bar.get_height() for bar in axes.patches] == [12.5, 75.0, 12.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["unmapped", "exact", "special"]
    plt.close("all")
