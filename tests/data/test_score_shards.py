"""Scores on disk: whole or not there, of these models and texts, and the same for equal texts."""

import json

import numpy as np
import pytest

from minillm import UserError
from minillm.config.data import TextCorpus
from minillm.data import documents as module
from minillm.data.documents import survey_documents
from minillm.data.score_shards import Scores, ScoreShards, text_hash

TEXTS = ["one", "two", "one", "three", "two"]
BY = {"teacher": {"path": "t"}, "reference": "r"}


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE_DOCUMENTS", 2)
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return survey_documents(TextCorpus(path=str(tmp_path / "x.jsonl")))


def scores(piece) -> Scores:
    numbers = np.arange(piece.first, piece.first + piece.count)
    hashes = np.array([text_hash(TEXTS[number]) for number in numbers], np.uint64)
    return Scores(numbers + 3, numbers + 0.5, numbers * 2.0, hashes)


def test_what_was_written_is_found_and_what_is_missing_is_told(corpus, tmp_path):
    shards = ScoreShards(tmp_path / "scores")
    assert shards.prepare(BY, corpus) == [0, 1, 2]
    shards.write(corpus.pieces[1], scores(corpus.pieces[1]))
    (shards.folder / ".scores-000000.safetensors.partial").write_text("what a kill left")
    assert ScoreShards(tmp_path / "scores").prepare(BY, corpus) == [0, 2]
    assert not list(shards.folder.glob("*.partial"))
    for piece in corpus.pieces:
        shards.write(piece, scores(piece))
    assert shards.prepare(BY, corpus) == []
    found = shards.read(corpus)
    assert found.tokens.tolist() == [3, 4, 5, 6, 7]
    # the third text is the first again, and the fifth the second: whatever they were scored beside
    assert found.teacher_nll.tolist() == [0.5, 1.5, 0.5, 3.5, 1.5]
    assert found.log_ratio.tolist() == [-0.5, 0.5, -0.5, 2.5, 0.5]
    assert found.first_place.tolist() == [0, 1, 0, 3, 1]


def test_scores_by_other_models_are_refused(corpus, tmp_path):
    ScoreShards(tmp_path / "scores").prepare(BY, corpus)
    with pytest.raises(UserError, match="holds scores of documents under another reference; undo the change"):
        ScoreShards(tmp_path / "scores").prepare({**BY, "reference": "other"}, corpus)


@pytest.mark.parametrize("content", [b"", b"\x00" * 40])
def test_a_damaged_file_is_named(corpus, tmp_path, content):
    shards = ScoreShards(tmp_path / "scores")
    shards.prepare(BY, corpus)
    for piece in corpus.pieces:
        shards.write(piece, scores(piece))
    (shards.folder / "scores-000001.safetensors").write_bytes(content)
    for use in (lambda: shards.prepare(BY, corpus), lambda: shards.read(corpus)):
        with pytest.raises(UserError, match=r"scores-000001.safetensors cannot be read .*; delete it"):
            use()
