"""What counts as the same answer."""

import pytest

from minillm.evaluate.exact_match import exact_match


@pytest.mark.parametrize("answer", ["New York", "new york.", "  New\n York!", '"NEW YORK"'])
def test_case_punctuation_and_spaces_do_not_matter(answer):
    assert exact_match(answer, ["New York"]) == 100.0


@pytest.mark.parametrize("answer", ["NewYork", "New York City", "", "York New"])
def test_words_do(answer):
    assert exact_match(answer, ["New York"]) == 0.0


def test_any_reference_will_do():
    assert exact_match("four", ["4", "Four."]) == 100.0


def test_no_reference_is_an_error():
    with pytest.raises(ValueError, match="no references"):
        exact_match("a", [])
