"""The package's questions as records: the splits apart, kinds of answers, pictures that are there, and pairs of one kind."""

import importlib.util
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import pytest

from minillm.config.data import EasyVqaPairs, EasyVqaPrompts
from minillm.config.models import StudentConfig
from minillm.data import easy_vqa
from minillm.data.easy_vqa import ANSWERS, easy_vqa_records
from minillm.data.instructions import load_prompts
from minillm.data.pairs import load_pairs
from minillm.data.sources import DataError
from minillm.models.tokenizers import load_tokenizer

PROCESSOR = "configs/pictures/processor"
KEYS = {"type": "easy_vqa", "max_prompt_length": 100, "max_response_length": 12}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(StudentConfig(path=PROCESSOR, tokenizer=PROCESSOR), Path("."))


def test_the_splits_have_other_pictures_and_are_in_one_order():
    train, test = (list(easy_vqa_records(split)) for split in ("train", "test"))
    assert (len(train), len(test)) == (38575, 9673)
    assert {where.folder.name for where, _ in train} == {"train"} and {where.folder.name for where, _ in test} == {
        "test"
    }
    assert [str(where) for where, _ in islice(easy_vqa_records("train"), 3)] == [str(where) for where, _ in train[:3]]
    assert len({record["image"] for _, record in train[:300]}) > 200, "the first of them are of many pictures"
    where, record = train[0]
    assert (where.folder / record["image"]).is_file() and record["image"].split("/")[-1][:-4] in where


@pytest.mark.parametrize("kind", ANSWERS)
def test_questions_of_one_kind(kind):
    records = [record for _, record in easy_vqa_records("test", [kind])]
    assert {record["answer"] for record in records} == set(ANSWERS[kind])
    for record in records:
        assert record["chosen"] == record["answer"] != record["rejected"] and record["rejected"] in ANSWERS[kind]
    assert {record["rejected"] for record in records} == set(ANSWERS[kind])


def test_kinds_can_be_balanced():
    """1,257 questions of the 9,673 ask for a shape, the fewest; those that stay are the first of their kind."""
    balanced = [record for _, record in easy_vqa_records("test", balanced=True)]
    for kind, words in ANSWERS.items():
        of_kind = [record for record in balanced if record["answer"] in words]
        first = islice((record for _, record in easy_vqa_records("test", [kind])), 1257)
        assert of_kind == list(first) and len(of_kind) == 1257
        assert sum(record["answer"] in words for record in balanced[:30]) == 10, "a limit keeps the balance"


@pytest.mark.parametrize(("kind", "percentage"), [("yes_no", 82.5), ("color", 12.0), ("shape", 34.8)])
def test_what_can_be_answered_without_looking(kind, percentage):
    """The commonest answer to a question's words in the training data: an accuracy that is no sign of seeing."""
    answers = defaultdict(Counter)
    for _, record in easy_vqa_records("train", [kind]):
        answers[record["question"]][record["answer"]] += 1
    held_out = [record for _, record in easy_vqa_records("test", [kind])]
    right = sum(answers[one["question"]].most_common(1)[0][0] == one["answer"] for one in held_out)
    assert 100 * right / len(held_out) == pytest.approx(percentage, abs=0.05)


def test_every_word_is_a_token_of_the_processor_of_the_recipes():
    """Answers are one token and their end, as max_response_length of configs/image_text/quickstart.yaml has it."""
    where = "configs/image_text/processor"
    tokenizer = load_tokenizer(StudentConfig(path=where, tokenizer=where), Path("."))
    for words in ANSWERS.values():
        assert all(len(tokenizer.encode(word)) == 1 for word in words)
    questions = {record["question"] for _, record in islice(easy_vqa_records("test"), 500)}
    assert all(len(tokenizer.encode(question)) == len(question.split()) + 1 for question in questions)  # and a ?


def test_prompts_show_the_picture_and_pairs_have_it_too(tokenizer):
    prompts = load_prompts(EasyVqaPrompts(**KEYS, limit=5, answers=["color"], balanced=True), tokenizer)
    pairs = load_pairs(EasyVqaPairs(**KEYS, limit=5, answers=["color"]), tokenizer)
    assert prompts.pictured == pairs.pictured == 5 and prompts.source == pairs.source == "easy_vqa"
    for example, pair in zip(prompts, pairs, strict=True):
        assert pair.chosen.prompt == example.prompt_ids and pair.chosen.response == example.response_ids
        assert example.references[0] in ANSWERS["color"]
        assert pair.rejected.response != pair.chosen.response


def test_a_package_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="needs easy-vqa.*pip install easy-vqa==1.0"):
        next(easy_vqa_records("train"))
    monkeypatch.undo()
    monkeypatch.setattr(easy_vqa, "_folder", lambda: tmp_path)
    with pytest.raises(DataError, match="not the data of easy-vqa"):
        next(easy_vqa_records("train"))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "questions.json").write_text('[["what?", "purple", 1]]')
    with pytest.raises(DataError, match="'purple' is no answer of easy-vqa 1.0"):
        next(easy_vqa_records("train"))
