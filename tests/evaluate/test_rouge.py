"""Rouge-L against values worked out by hand."""

import pytest

from minillm.evaluate.rouge import rouge_l


def test_is_the_f1_of_the_longest_common_subsequence():
    # LCS "the cat the mat" is 4 of 6 answer words and 4 of 5 reference words: P = 4/6, R = 4/5
    answer, reference = "the cat sat on the mat", "the cat near the mat"
    assert rouge_l(answer, [reference]) == pytest.approx(100 * 2 * (4 / 6) * (4 / 5) / (4 / 6 + 4 / 5))


def test_words_are_stemmed_and_case_and_punctuation_ignored():
    assert rouge_l("Running dogs!", ["the running, dog"]) == pytest.approx(100 * 2 * 1 * (2 / 3) / (1 + 2 / 3))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_best_reference_counts(order):
    references = ["nothing in common here", "a red house"]
    assert rouge_l("a red house", [references[place] for place in order]) == 100.0


def test_an_empty_answer_scores_nothing():
    assert rouge_l("", ["a red house"]) == 0.0


def test_no_reference_is_an_error():
    with pytest.raises(ValueError, match="no references"):
        rouge_l("a", [])
