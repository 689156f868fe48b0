"""The section of a report on documents that a stage has chosen."""

import json

import matplotlib.image
import numpy as np
import pytest

from minillm import UserError
from minillm.config.data import TextCorpus
from minillm.data.documents import survey_documents
from minillm.data.score_shards import Scores
from minillm.data.selection import choose, write_selection
from minillm.reporting.selection_report import selection_sections


@pytest.fixture
def run(tmp_path):
    """The folder of a run with a stage that kept two of five documents, of two sources."""
    lines = [{"text": f"*text* {number} | of five", "source": f"s{number % 2}"} for number in range(5)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    left = tmp_path / "stages" / "pick"
    left.mkdir(parents=True)
    scores = Scores(np.full(5, 8), np.ones(5), np.array([1.0, 3.5, 2, 1.5, 0.5]), np.array([0, 1, 2, 2, 0], np.uint64))
    documents = survey_documents(TextCorpus(path=str(tmp_path / "x.jsonl")))
    write_selection(documents, scores, choose(scores, 0.5), left, ratio=0.5)
    return tmp_path


def test_it_says_and_draws_what_was_kept_and_dropped(run):
    (section,) = selection_sections(run)
    assert section.startswith(
        "## Documents chosen by stage pick\n\n![Scores and lengths of the documents](selection-pick.png)"
    )
    assert "2 of 5 documents were kept" in section and "the lowest of these is 1.00 nats/token" in section
    assert "no token to be scored by" not in section
    assert "| kept | 2 | 0 | 16 | 8.00 | 1.75 | 1.00 | 2.75 |" in section
    assert "| dropped | 3 | 2 | 24 | 8.00 | 0 | 1.00 | 1.00 |" in section
    assert "| s0 | 3 | 33.3% | 24 | 33.3% |" in section and "| s1 | 2 | 50.0% | 16 | 50.0% |" in section
    assert r"| 2.50 | 8 | \*text\* 1 \| of five |" in section.partition("### Dropped")[0]
    assert r"\*text\* 4" in section.partition("### Dropped")[2]
    picture = matplotlib.image.imread(run / "selection-pick.png")
    assert picture.shape[0] > 200 and picture.std() > 0.05


def test_a_run_that_chose_nothing_has_no_such_section(tmp_path):
    assert selection_sections(tmp_path) == []


def test_a_damaged_file_is_named(run):
    (run / "stages" / "pick" / "selection.json").write_text("{")
    with pytest.raises(UserError, match=r"selection.json cannot be read"):
        selection_sections(run)
