"""Exact match: an answer is one of its references, whatever the case, the punctuation and the spaces."""

import string
from collections.abc import Sequence

from minillm import UserError

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """100 where the answer equals one of the references after normalisation, else 0.

    Raises UserError where there is no reference.
    """
    if not references:
        raise UserError("exact_match: no references; an example without one cannot be scored")
    return 100.0 * (_normalise(answer) in {_normalise(reference) for reference in references})


def _normalise(text: str) -> str:
    return " ".join(text.lower().translate(_PUNCTUATION).split())
