"""Which documents are kept: exactly so many, the best, of equals the earlier ones; and what is told of both kinds."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm import UserError
from minillm.config.data import TextCorpus
from minillm.data import selection
from minillm.data.documents import survey_documents
from minillm.data.score_shards import Scores
from minillm.data.selection import choose, kept_count, write_selection


def scores(values, tokens=None) -> Scores:
    values = np.array(values, float)
    tokens = np.full(len(values), 7) if tokens is None else np.array(tokens)
    return Scores(tokens, np.ones(len(values)), values + 1, np.arange(len(values), dtype=np.uint64))


def test_the_number_that_is_kept_is_that_of_the_written_decimal():
    assert [int(ratio * n) for ratio, n in ((0.29, 100), (0.57, 100))] == [28, 56]  # what floats make of them
    assert [kept_count(ratio, n) for ratio, n in ((0.29, 100), (0.57, 100), (0.5, 41), (0.1, 30))] == [29, 57, 20, 3]
    assert kept_count(1e-05, 1_000_000) == 10 and kept_count(0.7, 10**18 + 1) == 7 * 10**17


@given(st.integers(1, 99), st.integers(0, 10**12))
def test_the_number_is_the_floor_of_the_product(percentage, documents):
    assert kept_count(percentage / 100, documents) == percentage * documents // 100


@given(st.lists(st.integers(-3, 3), min_size=4, max_size=40), st.sampled_from([0.25, 0.5, 0.9]))
def test_the_best_are_kept_and_of_equals_the_earlier_ones(values, ratio):
    kept = choose(scores(values), ratio)
    ranked = sorted(range(len(values)), key=lambda place: (-values[place], place))
    assert sorted(ranked[: int(Fraction(ratio) * len(values))]) == np.flatnonzero(kept).tolist()


def test_documents_without_a_prediction_are_neither_counted_nor_kept():
    assert choose(scores([9, -1, 9, -2, -3], tokens=[0, 2, 0, 2, 2]), 0.67).tolist() == [
        False,
        True,
        False,
        True,
        False,
    ]


def test_a_score_that_is_no_number_and_a_selection_of_nothing_are_refused():
    with pytest.raises(UserError, match="1 documents have a score that is not finite, the first is number 2; "):
        choose(scores([1, np.nan, 2]), 0.5)
    with pytest.raises(UserError, match="2 documents .* number 1; "):
        choose(scores([np.inf, -np.inf, 2]), 0.5)
    with pytest.raises(UserError, match="method.ratio: 0.2 of 4 documents is none"):
        choose(scores([1, 2, 3, 4]), 0.2)


def test_the_corpus_and_what_is_told_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "MOST_SOURCES", 2)
    texts = ["süß\n\u2028 é", "b", "c" * 900, "d", "e", ""]
    sources = ["web", "web", "book", "late", "later", "web"]
    (tmp_path / "x.jsonl").write_text(
        "".join(
            json.dumps({"text": text, "source": source}) + "\n" for text, source in zip(texts, sources, strict=True)
        )
    )
    found = scores([0.5, 0.1, 0.4, 0.5, -1.0, 0], tokens=[10, 1, 30, 1, 5, 0])
    kept = choose(found, 0.6)
    write_selection(survey_documents(TextCorpus(path=str(tmp_path / "x.jsonl"))), found, kept, tmp_path, ratio=0.6)
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [line["text"] for line in lines] == [texts[0], texts[2], texts[3]]
    assert [(line["document"], line["score"], line["source"]) for line in lines] == [
        (1, 0.5, "web"), (3, 0.4, "book"), (4, 0.5, "late")
    ]  # fmt: skip
    told = json.loads((tmp_path / "selection.json").read_text())
    assert (told["documents"], told["without_prediction"], told["lowest_kept"]) == (6, 1, pytest.approx(0.4))
    kept_, dropped = told["groups"]["kept"], told["groups"]["dropped"]
    assert (kept_["documents"], kept_["tokens"], kept_["median_tokens"], kept_["score"]) == (
        3, 41, 10, pytest.approx(1.4 / 3)
    )  # fmt: skip
    assert (dropped["documents"], dropped["tokens"], dropped["score"]) == (2, 6, pytest.approx(-0.45))
    assert [(one["source"], one["documents"], one["kept"], one["kept_tokens"]) for one in told["sources"]] == [
        ("web", 3, 1, 10), ("book", 1, 1, 30), ("(others)", 2, 1, 1)
    ]  # fmt: skip
    assert [one["document"] for one in told["samples"]["kept"]] == [1, 4, 3]
    assert [one["document"] for one in told["samples"]["dropped"]] == [2, 5]
    assert told["samples"]["kept"][2]["text"] == "c" * 600
    for key, histogram in told["histograms"].items():
        assert len(histogram["edges"]) == len(histogram["kept"]) + 1, key
        assert sum(histogram["kept"]) == 3 and sum(histogram["dropped"]) == 2


def test_scores_that_are_all_equal_have_a_histogram_too(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 4)
    found = scores([0.0] * 4)
    documents = survey_documents(TextCorpus(path=str(tmp_path / "x.jsonl")))
    write_selection(documents, found, choose(found, 0.5), tmp_path, ratio=0.5)
    told = json.loads((tmp_path / "selection.json").read_text())["histograms"]["score"]
    assert sum(told["kept"]) == sum(told["dropped"]) == 2
