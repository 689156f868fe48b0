"""Two tokenisations of one text, cut into groups of tokens that stand for the same bytes.

A group ends wherever a token of both sides ends after the same bytes, so that none could be cut further. Where the two
texts differ (a tokenizer normalises, cannot write a character, or puts a space before a text), the tokens there are in no
group, and what follows is aligned again.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate, pairwise

from minillm.models.spelling import Spelling

DIFFERING = 4096  # units: longer differing parts are left out whole, since comparing them takes time by their square
_SPACE = ord(" ")
_UNKNOWN = (256, 257)  # the unit of a token that stands for no text, which nothing on the other side equals


@dataclass(frozen=True)
class TokenGroup:
    """Tokens of the one side, and those of the other with the same bytes: places in the two answers, ends excluded."""

    student: tuple[int, int]
    teacher: tuple[int, int]


def token_bytes(spelling: Spelling, ids: Sequence[int]) -> list[bytes | None]:
    """The bytes that each id stands for; None for special tokens and ids without a name."""
    return [
        None if index not in spelling.texts else spelling.texts[index].encode("utf-8", "surrogateescape")
        for index in ids
    ]


def align(student: Sequence[bytes | None], teacher: Sequence[bytes | None]) -> list[TokenGroup]:
    """The groups of two tokenisations, in order."""
    ours, theirs = (
        [_units(token, unknown) for token in tokens]
        for tokens, unknown in zip((student, teacher), _UNKNOWN, strict=True)
    )
    _drop_leading_space(ours, theirs)
    ends = [list(accumulate(map(len, side))) for side in (ours, theirs)]
    texts = [[unit for token in side for unit in token] for side in (ours, theirs)]
    shared = _shared_boundaries(*texts, *map(set, ends))
    groups = []
    for (start, their_start), (stop, their_stop) in pairwise(shared):
        if texts[0][start:stop] == texts[1][their_start:their_stop]:
            places = [
                (0 if first == 0 else bisect_right(end, first), bisect_right(end, last))
                for end, first, last in zip(ends, (start, their_start), (stop, their_stop), strict=True)
            ]
            groups.append(TokenGroup(*places))
    return groups


def _units(token: bytes | None, unknown: int) -> list[int]:
    return [unknown] if token is None else list(token)


def _drop_leading_space(*sides: list[list[int]]) -> None:
    """Take away the space that sentencepiece writes before a text, where the other side has none there."""
    first = [next((token for token in side if token), []) for side in sides]
    spaces = [_spaces(side) for side in sides]
    for token, mine, other in zip(first, spaces, reversed(spaces), strict=True):
        if mine == other + 1:
            del token[0]


def _spaces(side: list[list[int]]) -> int:
    """Spaces at the beginning."""
    count = 0
    for unit in (unit for token in side for unit in token):
        if unit != _SPACE:
            break
        count += 1
    return count


def _shared_boundaries(
    ours: list[int], theirs: list[int], our_ends: set[int], their_ends: set[int]
) -> list[tuple[int, int]]:
    """Places (i, j), in order, at which a token of both ends and which lie at the same place of the common text; the
    beginnings are one of them."""
    found = {(0, 0)}
    for start, their_start, size in _equal_blocks(ours, theirs):
        for offset in range(size + 1):
            if start + offset in our_ends and their_start + offset in their_ends:
                found.add((start + offset, their_start + offset))
    return sorted(found)


def _equal_blocks(ours: list[int], theirs: list[int]) -> Iterator[tuple[int, int, int]]:
    """(place, place, length) of the equal parts of two texts."""
    least = min(len(ours), len(theirs))
    before = next((place for place in range(least) if ours[place] != theirs[place]), least)
    yield 0, 0, before
    after = next((place for place in range(least - before) if ours[-1 - place] != theirs[-1 - place]), least - before)
    middle, their_middle = ours[before : len(ours) - after], theirs[before : len(theirs) - after]
    if middle and their_middle and max(len(middle), len(their_middle)) <= DIFFERING:
        for block in SequenceMatcher(None, middle, their_middle, autojunk=False).get_matching_blocks():
            yield before + block.a, before + block.b, block.size
    yield len(ours) - after, len(theirs) - after, after
