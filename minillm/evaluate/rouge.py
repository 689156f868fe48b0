"""Rouge-L of an answer against its references (Lin 2004), as MiniLLM's evaluation has it: F1, stemmed, best of several.

The library's tokenizer keeps a-z and 0-9 alone, so that texts in other scripts score 0.
"""

from collections.abc import Sequence
from functools import cache

from rouge_score.rouge_scorer import RougeScorer

from minillm import UserError


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """100 * F1 of the longest common subsequence with the reference that it is nearest to. In [0, 100].

    Raises UserError where there is no reference.
    """
    if not references:
        raise UserError("rouge_l: no references; an example without one cannot be scored")
    return 100.0 * max(_scorer().score(reference, answer)["rougeL"].fmeasure for reference in references)


@cache
def _scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)
