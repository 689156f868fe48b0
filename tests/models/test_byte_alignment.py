"""Groups of tokens that stand for the same bytes: over any cuts of any text, and over texts that differ."""

from itertools import accumulate, pairwise

from hypothesis import given
from hypothesis import strategies as st

from minillm.models.byte_alignment import DIFFERING, TokenGroup, align

HOSTILE = st.text(alphabet=st.sampled_from("ab  \n\t😀👩‍👧日本שלםée\u0301\u200f\x00"), max_size=30)


def cut(data: bytes, places: set[int]) -> list[bytes]:
    """The bytes in tokens that end at these places, those beyond the text left out."""
    ends = sorted({0, len(data), *(place for place in places if place < len(data))})
    return [data[start:stop] for start, stop in pairwise(ends)]


def text_of(tokens, span):
    return b"".join(tokens[slice(*span)])


@given(HOSTILE, st.sets(st.integers(1, 90)), st.sets(st.integers(1, 90)))
def test_one_text_is_aligned_whole_and_no_group_could_be_cut_further(text, places, others):
    ours, theirs = cut(text.encode(), places), cut(text.encode(), others)
    groups = align(ours, theirs)
    assert [text_of(ours, one.student) for one in groups] == [text_of(theirs, one.teacher) for one in groups]
    for side, tokens in (("student", ours), ("teacher", theirs)):
        spans = [getattr(group, side) for group in groups]
        assert [place for span in spans for place in range(*span)] == list(range(len(tokens)))
    ends = [{*accumulate(map(len, tokens))} for tokens in (ours, theirs)]
    assert len(groups) == len(ends[0] & ends[1])


@given(HOSTILE, HOSTILE, st.sets(st.integers(1, 90)), st.sets(st.integers(1, 90)))
def test_different_texts_have_groups_of_equal_bytes_in_order(text, other, places, others):
    ours, theirs = cut(text.encode(), places), cut(other.encode(), others)
    groups = align(ours, theirs)
    for group in groups:
        student, teacher = text_of(ours, group.student), text_of(theirs, group.teacher)
        assert student == teacher or b" " + student == teacher or student == b" " + teacher
        assert student and teacher
    for side in ("student", "teacher"):
        spans = [getattr(group, side) for group in groups]
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))


@given(st.sets(st.integers(1, 40)), st.sets(st.integers(1, 40)))
def test_around_a_part_that_differs_everything_is_aligned(places, others):
    text, other = b"the same beginning X and the same end", b"the same beginning YY and the same end"
    ours, theirs = cut(text, places | {19, 20}), cut(other, others | {19, 21})
    found = b"".join(text_of(ours, group.student) for group in align(ours, theirs))
    assert found == text.replace(b"X", b"")


def test_the_space_that_sentencepiece_writes_before_a_text_counts_as_nothing():
    assert align([b" Hello", b"!"], [b"Hel", b"lo", b"!"]) == [TokenGroup((0, 1), (0, 2)), TokenGroup((1, 2), (2, 3))]
    assert align([b"x"], [b" ", b"x"]) == [TokenGroup((0, 1), (0, 2))]
    # a space that both have stays
    assert align([b"  a"], [b" ", b"a"]) == [TokenGroup((0, 1), (0, 2))]
    assert align([b" a"], [b" ", b"a"]) == [TokenGroup((0, 1), (0, 2))]


def test_tokens_that_stand_for_no_text_are_in_no_group():
    assert align([b"a", None, b"b"], [b"a", b"b"]) == [TokenGroup((0, 1), (0, 1)), TokenGroup((2, 3), (1, 2))]
    assert align([b"a", None, b"b"], [b"a", None, b"b"]) == [TokenGroup((0, 1), (0, 1)), TokenGroup((2, 3), (2, 3))]
    assert align([], [b"a"]) == [] == align([None], [None])


def test_a_token_of_no_bytes_goes_with_what_is_before_it():
    assert align([b"", b"a", b"", b"b"], [b"a", b"b"]) == [TokenGroup((0, 3), (0, 1)), TokenGroup((3, 4), (1, 2))]


def test_long_parts_that_differ_are_left_out_whole_and_not_compared():
    ours, theirs = [b"a", *[b"x"] * (DIFFERING + 1), b"z"], [b"a", *[b"xy"] * DIFFERING, b"z"]
    groups = align(ours, theirs)
    assert [text_of(ours, group.student) for group in groups][-1] == b"z" and len(groups) <= 3
