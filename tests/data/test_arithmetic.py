"""Sums that are made on the spot: right, without negative results, and never in both splits."""

from itertools import islice

from minillm.data.answer_parsers import parse_answer
from minillm.data.arithmetic import arithmetic_records
from minillm.evaluate.equations import evaluate_equation


def test_every_step_and_result_is_right():
    for _, record in islice(arithmetic_records(3, 20, "train"), 300):
        lines = record["rationale"].split("\n")
        assert len(lines) == 3 and evaluate_equation(record["question"]) == int(record["label"]) >= 0
        for line in lines:
            left, right = line.split(" = ")
            assert evaluate_equation(left) == int(right) >= 0
        assert lines[-1].endswith(f" = {record['label']}")
        parts = parse_answer(record["answer"], "gsm8k")
        assert (parts.rationale, parts.label) == (record["rationale"], record["label"])


def test_splits_share_no_question_and_repeat_alike():
    train, test = ([record["question"] for _, record in islice(arithmetic_records(2, 5, split), 500)]
                   for split in ("train", "test"))  # fmt: skip
    assert not set(train) & set(test) and len(set(test)) > 20
    assert train == [record["question"] for _, record in islice(arithmetic_records(2, 5, "train"), 500)]
    assert {sign for question in train for sign in question.split()[1::2]} == {"+", "-"}
