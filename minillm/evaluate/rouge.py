"""Rouge-L of an answer against its references (Lin 2004), as MiniLLM's evaluation has it: F1, stemmed, best of several.

Latin text is cut into words by the library's own tokenizer, which keeps a-z and 0-9 alone. Words of other scripts, which
it would leave out, stand between them; scripts that are written without spaces give a token a character.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from minillm import UserError

_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """100 * F1 of the longest common subsequence with the reference that it is nearest to. In [0, 100].

    Raises UserError where there is no reference.
    """
    if not references:
        raise UserError("rouge_l: no references; an example without one cannot be scored")
    return 100.0 * max(_scorer().score(reference, answer)["rougeL"].fmeasure for reference in references)


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], tokenizer=_AllScripts())


class _AllScripts(Tokenizer):
    """The library's tokenizer on what is Latin, and words or characters of every other script."""

    def __init__(self):
        self.latin = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        if text.isascii():
            return self.latin.tokenize(text)
        tokens: list[str] = []
        for other, characters in groupby(unicodedata.normalize("NFC", text), _is_of_another_script):
            run = "".join(characters)
            tokens += _words(run.lower()) if other else self.latin.tokenize(run)
        return tokens


def _words(run: str) -> Iterator[str]:
    """The tokens of a run of letters, marks and digits: the whole of it, or a character with its marks."""
    word = ""
    for character in run:
        mark = unicodedata.category(character)[0] == "M"
        if word and not mark and (_is_unspaced(character) or _is_unspaced(word[0])):
            yield word
            word = ""
        word += character
    yield word


@cache
def _is_of_another_script(character: str) -> bool:
    if character.isascii() or unicodedata.category(character)[0] not in "LMN":
        return False
    return not unicodedata.name(character, "").startswith(("LATIN", "COMBINING"))


@cache
def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_UNSPACED)
