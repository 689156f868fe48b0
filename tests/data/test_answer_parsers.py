"""Rationales and labels out of texts: the released parsers where they are right, and texts that break those."""

import json
import os
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.config.data import Parser
from minillm.data.answer_parsers import Reasoned, parse_answer
from minillm.data.sources import read_jsonl

# (parser, text) -> the label where it differs from the released one on purpose
CORRECTED = {
    ("svamp", "Nested. The answer is ((2.0 * 3.0) - 1.0) apples (yes)."): "((2.0 * 3.0) - 1.0)",
    ("anli", "It does not. So the answer is contradiction"): "contradiction",
    ("esnli", "R1. Answer: entailment because. Premise: x"): "entailment because",
    ("esnli", "Two.\n\nAnswer: neutral.\n"): "neutral",
}


def golden_cases() -> list[tuple[str, dict]]:
    folder = os.environ.get("MINILLM_GOLDEN")
    if not folder:
        return []
    cases = json.loads((Path(folder) / "6_dsbs_parse.json").read_text())["cases"]
    return [(parser, case) for parser, several in cases.items() for case in several]


@pytest.mark.skipif(not golden_cases(), reason="MINILLM_GOLDEN does not name a folder with reference values")
def test_parts_are_those_of_the_released_parsers_wherever_these_find_a_label():
    cases = golden_cases()
    assert len(cases) == 40
    labelled = 0
    for parser, case in cases:
        found, released = parse_answer(case["text"], parser), case["gpt"]
        if released["label"].strip():
            labelled += 1
            assert found.label == CORRECTED.get((parser, case["text"]), released["label"]), case
            assert found.rationale == released["rationale"].strip(), case
        else:
            assert found.label is None, case
    assert labelled == 4 + 6 + 6 + 5  # of ten each


@pytest.mark.parametrize(
    "parser, text, rationale, label",
    [
        ("gsm8k", "48/2 = 24 clips.\n24 in all.\n#### 1,024", "48/2 = 24 clips.\n24 in all.", "1,024"),
        ("gsm8k", "One. #### 1 no: #### 2\nand more", "One. #### 1 no:", "2"),
        ("gsm8k", "Cut off ####", "Cut off", None),
        ("gsm8k", "No mark", None, None),
        ("cqa", "It is a bank. So the answer is bank.", "It is a bank.", None),
        ("cqa", "One. So the answer is (a) x. So the answer is (b) y.", None, None),
        ("svamp", "Add. The answer is (1 + (2", "Add.", None),
        ("svamp", "Add. The answer is (1 +\n2)", "Add.", None),
        ("anli", "Yes. So the answer is neutral?", "Yes.", "neutral?"),
        ("esnli", "R. Answer:", "R.", None),
    ],
)
def test_parts_of(parser, text, rationale, label):
    assert parse_answer(text, parser) == Reasoned(rationale, label)


@given(st.text(alphabet="QP:()ab#. \nSo", max_size=60), st.sampled_from(get_args(Parser)))
def test_no_text_raises_and_a_label_is_never_empty(text, parser):
    for marked in (text, f"{text}So the answer is{text}", f"{text}Answer: {text}", f"{text}The answer is ({text}"):
        found = parse_answer(marked, parser)
        assert found.label is None or found.label.strip() == found.label != ""
        assert found.rationale is not None or found.label is None


def test_every_solution_of_gsm8k_has_a_rationale_and_a_number(assets):
    answers = [record["answer"] for _, record in read_jsonl(str(assets / "data/gsm8k/test.jsonl"))]
    parts = [parse_answer(answer, "gsm8k") for answer in answers]
    assert len(parts) == 1319 and all(one.rationale for one in parts)
    assert all(one.label.replace(",", "").removeprefix("-").isdigit() for one in parts)
