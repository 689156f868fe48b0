"""Long documents to ids a window at a time: a tokenizer takes hundreds of bytes for each character of a text."""

from array import array
from bisect import bisect_left
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

WINDOW, _OVERLAP = 1 << 18, 1 << 14  # characters
_AGREED = 32  # tokens on either side of a cut that both windows must have at the same places
_LONGEST = 16  # windows, to which one may grow


class _Tokens(NamedTuple):
    ids: list[int]
    starts: list[int]  # of each, in characters of the document


def document_ids(tokenizer: PreTrainedTokenizerBase, text: str, *, window: int = WINDOW) -> array:
    """The ids of a whole text (64-bit), without what the tokenizer puts around texts.

    A text over `window` characters is tokenised in windows that overlap. One goes on where it and the next have had the
    same tokens for a while, so that the ids are those of the whole text with every tokenizer whose tokens depend on what
    stands near them alone, as those that split texts into words do. Where two windows do not agree, the first one grows;
    in the end, and for tokenizers without offsets (those in Python), the text is tokenised as one.
    """
    if len(text) <= window or not tokenizer.is_fast:
        return _whole(tokenizer, text)
    ids, overlap = array("q"), min(_OVERLAP, window // 4)
    start, size, done = 0, window, 0  # `done` tokens of this window were the last window's to give
    now = _tokens(tokenizer, text, start, size)
    while start + size < len(text):
        following = start + size - overlap
        after = _tokens(tokenizer, text, following, window)
        cut = _agreement(now, after, following)
        if cut is not None and cut[0] >= done:
            ids.extend(now.ids[done : cut[0]])
            start, size, done, now = following, window, cut[1], after
            continue
        size *= 2
        longer = _tokens(tokenizer, text, start, size)
        if size > _LONGEST * window or longer.ids[:done] != now.ids[:done]:
            return _whole(tokenizer, text)
        now = longer
    ids.extend(now.ids[done:])
    return ids


def _whole(tokenizer: PreTrainedTokenizerBase, text: str) -> array:
    return array("q", tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, start: int, size: int) -> _Tokens:
    piece = text[start : start + size]
    found = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return _Tokens(found.input_ids, [start + first for first, _ in found.offset_mapping])


def _agreement(before: _Tokens, after: _Tokens, following: int) -> tuple[int, int] | None:
    """The number of tokens to take of one window and to leave out of the next, which begins at character `following`.

    None where they have no 2 * _AGREED tokens in common, one after another, with a cut between characters in the middle.
    """
    left, right, run = bisect_left(before.starts, following), 0, 0
    while left < len(before.ids) and right < len(after.ids):
        if (before.ids[left], before.starts[left]) == (after.ids[right], after.starts[right]):
            left, right, run = left + 1, right + 1, run + 1
            middle = left - _AGREED
            # the tokens of one character start at the same place
            if run >= 2 * _AGREED and before.starts[middle] > before.starts[middle - 1]:
                return middle, right - _AGREED
        else:
            run = 0
            ahead = before.starts[left] - after.starts[right]
            left, right = left + (ahead <= 0), right + (ahead >= 0)
    return None
