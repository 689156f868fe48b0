"""The grid that all pictures are drawn in."""

import pytest
from PIL import Image

from minillm.reporting.panels import COLUMNS, draw_panels, grid, pick


@pytest.mark.parametrize(("count", "rows"), [(1, 1), (COLUMNS, 1), (COLUMNS + 1, 2)])
def test_panels_fill_rows_and_the_rest_is_empty(count, rows):
    figure, panels = grid(count)
    assert len(panels) == count
    places = figure.axes[0].get_gridspec()
    assert places.nrows == rows and places.ncols == min(count, COLUMNS)
    assert sum(panel.axison for panel in figure.axes) == count


def test_choices_come_round_again():
    assert [pick("ab", place) for place in range(4)] == ["a", "b", "a", "b"]


def test_a_picture_of_nothing_is_taken_away(tmp_path):
    path = tmp_path / "picture.png"
    assert draw_panels(["one"], lambda panel, key: panel.plot([1, 2], label=key), path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]
    assert not draw_panels([], lambda panel, key: None, path) and not path.exists()
