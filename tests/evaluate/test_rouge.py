"""Rouge-L against values worked out by hand."""

import pytest
from rouge_score.rouge_scorer import RougeScorer

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


@pytest.mark.parametrize(
    "text",
    ["\u4eca\u5929\u5929\u6c14\u5f88\u597d\u3002", "\u043c\u0430\u043c\u0430 \u043c\u044b\u043b\u0430 \u0440\u0430\u043c\u0443", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35\u0e04\u0e23\u0e31\u0e1a", "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e", "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643"],
)  # fmt: skip
def test_texts_in_other_scripts_are_measured(text):
    """Chinese, Russian, Thai, Hindi, Arabic: equal texts were 0."""
    assert rouge_l(text, [text]) == 100
    assert rouge_l("an answer", [text]) == 0
    assert 0 < rouge_l(text[: len(text) // 2 + 1], [text]) < 100


def test_words_of_a_script_with_spaces_and_characters_of_one_without():
    assert rouge_l(
        "\u043c\u0430\u043c\u0430 \u0431\u044b\u043b\u0430", ["\u041c\u0430\u043c\u0430 \u043c\u044b\u043b\u0430"]
    ) == pytest.approx(50)  # one word of two
    assert rouge_l("\u5929\u6c14\u574f", ["\u5929\u6c14\u597d"]) == pytest.approx(200 / 3)  # two characters of three
    assert rouge_l("GPT \u5f88\u597d", ["gpt \u597d"]) == pytest.approx(80)  # both kinds in their order


def test_latin_text_is_measured_as_the_library_does():
    library = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [
        ("The caf\u00e9s were running", "A caf\u00e9 ran \u2013 na\u00efve!"),
        ("cost: \u20ac3 \u2014 fine", "it costs \u20ac3"),
        ("a", "a b"),
    ]
    for answer, reference in pairs:
        assert rouge_l(answer, [reference]) == 100 * library.score(reference, answer)["rougeL"].fmeasure
