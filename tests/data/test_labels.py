"""Classification sets: how records become questions, and what is wrong with records that do not."""

import pytest

from minillm.config.analysis_keys import JsonlLabels
from minillm.data.labels import load_labels
from minillm.data.sources import DataError


def labels(path: str, **keys) -> JsonlLabels:
    usual = {"question": "Mood of {text}?", "label": "mood", "words": ["bad", "good"], "template": "none"}
    return JsonlLabels(path=path, **{**usual, **keys})


def test_places_words_and_truth_values_are_labels(byte, jsonl):
    records = [{"text": "rain", "mood": value} for value in (0, 1, "Good ", False, True)]
    found = load_labels(labels(jsonl(*records)), byte, name="moods")
    assert [question.label for question in found.questions] == [0, 1, 1, 0, 1]
    first = found.questions[0]
    assert byte.decode(first.prompt_ids) == "Mood of rain?"
    assert [byte.decode(ids) for ids in first.word_ids] == ["bad", "good"]


def test_long_questions_are_dropped_and_counted_and_limits_hold(byte, jsonl):
    path = jsonl({"text": "x" * 50, "mood": 0}, *({"text": "y", "mood": 1} for _ in range(3)))
    found = load_labels(labels(path, max_prompt_length=20, limit=2), byte, name="moods")
    assert (len(found), found.dropped_long) == (2, 1)
    with pytest.raises(DataError, match="moods: no usable question"):
        load_labels(labels(path, max_prompt_length=2), byte, name="moods")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"mood": 1}, "data.jsonl:1: question names the field text, and the record has mood"),
        ({"text": "a", "mood": 2}, "data.jsonl:1: mood is 2; expected one of bad, good"),
        ({"text": "a", "mood": "so so"}, "mood is 'so so'"),
        ({"text": "a"}, "mood is None"),
        ({"text": None, "mood": 1}, "data.jsonl:1: question names the field text, which is null here"),
        ({"text": ["a"], "mood": 1}, "data.jsonl:1: text: expected text or a number, found list"),
    ],
)
def test_a_record_that_says_nothing_is_named(byte, jsonl, record, message):
    with pytest.raises(DataError, match=message):
        load_labels(labels(jsonl(record)), byte, name="moods")


def test_a_question_is_a_text_with_fields_and_braces(byte, jsonl):
    path = jsonl({"a.b": "rain", "mood": 1})
    (question,) = load_labels(labels(path, question="{{{a.b}}}"), byte, name="moods").questions
    assert byte.decode(question.prompt_ids) == "{rain}"
    with pytest.raises(ValueError, match="question"):
        labels(path, question="{a.b")
