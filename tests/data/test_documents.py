"""Whole documents: in order, in pieces that depend on the corpus alone, and noticed where they change."""

import json

import pytest

from minillm.config.data import HfCorpus, PydocCorpus, TextCorpus
from minillm.data import documents as module
from minillm.data.documents import read_documents, survey_documents
from minillm.data.sources import DataError


def write(path, texts, **fields):
    path.write_text("".join(json.dumps({"text": text, **fields}) + "\n" for text in texts))
    return str(path)


def test_documents_stand_in_the_order_of_their_files_with_their_sources(tmp_path):
    write(tmp_path / "b.jsonl", ["third", "fourth"], source="the web")
    write(tmp_path / "a.jsonl", ["first", "second\nline"], source=3)
    (tmp_path / "c.jsonl.txt").write_text("no record")
    found = list(read_documents(TextCorpus(path=str(tmp_path / "*.jsonl"))))
    assert [text for _, text in found] == ["first", "second\nline", "third", "fourth"]
    assert [place.source for place, _ in found] == [str(tmp_path / "a.jsonl")] * 2 + ["the web"] * 2
    found = list(read_documents(TextCorpus(path=str(tmp_path / "*.jsonl"), skip=1, limit=2)))
    assert [text for _, text in found] == ["second\nline", "third"]
    assert [str(place) for place, _ in found] == [f"{tmp_path / 'a.jsonl'}:2", f"{tmp_path / 'b.jsonl'}:1"]


def test_texts_datasets_and_docstrings_have_sources_too(tmp_path):
    from datasets import Dataset

    (tmp_path / "book.txt").write_text("a book")
    ((place, text),) = read_documents(TextCorpus(path=str(tmp_path / "*.txt")))
    assert (place.source, text) == (str(tmp_path / "book.txt"), "a book")
    Dataset.from_list([{"text": "one"}, {"text": "two"}]).save_to_disk(tmp_path / "set")
    found = list(read_documents(HfCorpus(type="hf", path=str(tmp_path / "set"), skip=1)))
    assert [(place.source, text) for place, text in found] == [(f"{tmp_path / 'set'} (train)", "two")]
    found = list(read_documents(PydocCorpus(type="pydoc", limit=3)))
    assert len(found) == 3 and {place.source for place, _ in found} == {"pydoc"}


def test_a_piece_ends_with_its_documents_or_its_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE_DOCUMENTS", 3)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 20)
    texts = ["a", "b", "c", "x" * 19, "y", "z" * 50, "end"]
    corpus = survey_documents(TextCorpus(path=write(tmp_path / "x.jsonl", texts)))
    assert len(corpus) == 7
    assert [(one.index, one.first, one.count) for one in corpus.pieces] == [(0, 0, 3), (1, 3, 2), (2, 5, 1), (3, 6, 1)]
    wanted = [(piece.index, [text for _, text in found]) for piece, found in corpus.read_pieces({1, 3}.__contains__)]
    assert wanted == [(1, ["x" * 19, "y"]), (3, ["end"])]
    assert len({one.crc for one in corpus.pieces}) == 4


def test_texts_that_are_divided_otherwise_are_other_texts(tmp_path):
    one, other = (survey_documents(TextCorpus(path=write(tmp_path / f"{name}.jsonl", texts)))
                  for name, texts in (("one", ["ab", "c"]), ("other", ["a", "bc"])))  # fmt: skip
    assert one.pieces[0].crc != other.pieces[0].crc


@pytest.mark.parametrize("change", [["one", "TWO", "three"], ["one", "two"]])
def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path, change):
    path = tmp_path / "x.jsonl"
    corpus = survey_documents(TextCorpus(path=write(path, ["one", "two", "three"])))
    write(path, change)
    with pytest.raises(DataError, match="documents 1 to 3 have changed since this run began"):
        list(corpus.read_pieces(lambda index: True))


def test_an_empty_corpus_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", ["one"])
    with pytest.raises(DataError, match="there is no document"):
        survey_documents(TextCorpus(path=path, skip=1))
