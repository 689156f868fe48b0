"""PM-MinED against its definition with a real edit distance, special tokens by their role, and maps that are kept."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.models.spelling import Spelling, spelling_of
from minillm.models.tokenizers import byte_tokenizer
from minillm.models.vocabulary_map import FOLDER, KINDS, kept_map, vocabulary_map

WORDS = st.lists(st.text("ab ", min_size=1, max_size=5), min_size=1, max_size=14)


def spelled(words, *, roles=None, specials=None, of_bytes=()) -> Spelling:
    specials = specials or {}
    names = {**dict(enumerate(words)), **specials}
    texts = {index: word for index, word in names.items() if index not in specials}
    return Spelling(names, texts, frozenset(of_bytes), specials, roles or {})


def levenshtein(one: str, other: str) -> int:
    row = list(range(len(other) + 1))
    for i, ours in enumerate(one, 1):
        before, row[0] = row[0], i
        for j, theirs in enumerate(other, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (ours != theirs))
    return row[-1]


def by_definition(token: str, words: list[str]) -> int:
    """An exact match, else the nearest of those that are a prefix of the token or begin with it, of several the lowest id."""
    if token in words:
        return words.index(token)
    candidates = [
        (levenshtein(token, word), index)
        for index, word in enumerate(words)
        if (token.startswith(word) or word.startswith(token)) and (word != " " or not token.strip(" "))
    ]
    return min(candidates)[1] if candidates else -1


@given(WORDS, WORDS)
def test_every_token_goes_where_the_definition_says(source, target):
    made = vocabulary_map(spelled(source), spelled(target))
    assert made.ids.tolist() == [by_definition(token, target) for token in source]
    for token, index, kind in zip(source, made.ids.tolist(), made.kinds.tolist(), strict=True):
        found = None if index < 0 else target[index]
        want = (
            "unmapped"
            if found is None
            else "exact"
            if found == token
            else "longer"
            if found.startswith(token)
            else "shorter"
        )
        assert KINDS[kind] == want


@given(WORDS, WORDS)
def test_without_the_nearest_only_ids_of_the_same_text_are_mapped(source, target):
    ours, theirs = spelled(source), spelled(target)
    whole, exact = vocabulary_map(ours, theirs), vocabulary_map(ours, theirs, nearest=False)
    same = whole.kinds == KINDS.index("exact")
    assert exact.ids.tolist() == whole.ids.where(same, -1).tolist()


@given(WORDS)
def test_a_vocabulary_maps_to_itself_exactly(words):
    words = list(dict.fromkeys(words))
    made = vocabulary_map(spelled(words), spelled(words))
    assert made.ids.tolist() == list(range(len(words))) and made.counts()["exact"] == len(words)


def test_special_tokens_go_by_role_and_name_and_bytes_by_their_byte():
    words = ["<s>", "</s>", "<|im_end|>", "<tool>", "<0x41>", "<0x42>", "<b>", "x"]
    specials = {0: "<s>", 1: "</s>", 2: "<|im_end|>", 3: "<tool>"}
    source = spelled(words, roles={"bos": 0, "eos": 1, "turn": 2}, specials=specials)
    source = Spelling(source.names, {4: "A", 5: "B", 6: "<b>", 7: "x"}, frozenset({4, 5}), specials, source.roles)
    target = spelled(
        ["A", "z", "w", "<tool>", "end", "begin"],
        roles={"eos": 4, "bos": 5},
        specials={3: "<tool>", 4: "end", 5: "begin"},
    )
    # the model's end of turn ends an answer of the delta, which knows no turns; nothing here has B, <b> or x
    assert vocabulary_map(source, target).ids.tolist() == [5, 4, 4, 3, 0, -1, -1, -1]
    released = vocabulary_map(source, target, special="by_id").ids.tolist()
    assert released[:6] == [0, 1, 2, 3, 4, 5], released  # to whatever stands at the same id, letters too


def test_byte_level_and_sentencepiece_are_spelled_alike(assets):
    from transformers import AutoTokenizer

    stories, letters = (
        spelling_of(AutoTokenizer.from_pretrained(assets / "models" / name)) for name in ("stories260k", "babyllama105")
    )
    raw = byte_tokenizer()
    of_bytes = spelling_of(raw)
    assert of_bytes.texts[raw("é", add_special_tokens=False).input_ids[0]] == "\udcc3"
    made = vocabulary_map(of_bytes, stories)
    assert made.counts() == {"unmapped": 0, "exact": 256, "shorter": 0, "longer": 0, "special": 1}
    to = lambda text: stories.names[int(made.ids[raw(text, add_special_tokens=False).input_ids[0]])]  # noqa: E731
    assert (to(" "), to("e"), to("\n"), to("é")) == ("▁", "e", "<0x0A>", "<0xC3>")
    made = vocabulary_map(letters, stories)
    assert made.counts()["exact"] == 102 and made.counts()["special"] == 3
    assert all(letters.names[index] == stories.names[int(made.ids[index])] for index in letters.names)


def test_30000_ids_take_a_second():
    words = ["".join(" abcdefghij"[int(digit)] for digit in str(7919 * n)) for n in range(30_000)]
    others = [word + "k" * (n % 2) for n, word in enumerate(words[::-1])]
    started = time.process_time()
    made = vocabulary_map(spelled(words), spelled(others))
    assert time.process_time() - started < 8  # about 1; comparing all with all takes many minutes
    assert made.counts()["exact"] == 15_000 and made.counts()["unmapped"] < 15_000


def test_a_map_is_kept_beside_the_delta_and_made_again_where_it_is_damaged(tmp_path, monkeypatch):
    source, target = spelled(["ab", "b", "c"]), spelled(["a", "b"])
    made = kept_map(source, target, tmp_path)
    (file,) = (tmp_path / FOLDER).iterdir()
    monkeypatch.setattr("minillm.models.vocabulary_map.vocabulary_map", lambda *args: pytest.fail("it was there"))
    kept = kept_map(source, target, tmp_path)
    assert kept.ids.tolist() == made.ids.tolist() == [0, 1, -1] and kept.kinds.tolist() == made.kinds.tolist()
    monkeypatch.undo()
    file.write_bytes(b"{}")
    assert kept_map(source, target, tmp_path).ids.tolist() == [0, 1, -1]
    assert kept_map(source, spelled(["c"]), tmp_path).ids.tolist() == [-1, -1, 0]  # another vocabulary, another file
    assert len([*(tmp_path / FOLDER).iterdir()]) == 2
    assert kept_map(source, target, tmp_path / "nowhere").ids.tolist() == [0, 1, -1]
