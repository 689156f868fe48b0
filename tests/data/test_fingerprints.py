"""Fingerprints: equal for what makes the same ids of a text, and another for anything else."""

from tokenizers.normalizers import Lowercase

from minillm.data.fingerprints import template_fingerprint, texts_fingerprint, tokenizer_fingerprint
from minillm.models.tokenizers import byte_tokenizer


def test_a_tokenizer_is_known_by_what_it_makes_of_a_text(tmp_path):
    one, other = byte_tokenizer(), byte_tokenizer()
    other("abc", padding="max_length", max_length=5, truncation=True)  # settings of a call, which stay behind
    other.padding_side = "left"
    one.save_pretrained(tmp_path / "saved")
    saved = type(one).from_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other) == tokenizer_fingerprint(saved)
    other.backend_tokenizer.normalizer = Lowercase()
    added = byte_tokenizer()
    added.add_tokens(["<x>"])
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in (one, other, added)}) == 3


def test_a_template_and_texts_in_their_order():
    one, other = byte_tokenizer(), byte_tokenizer()
    other.chat_template = one.chat_template + " "
    assert template_fingerprint(one) == template_fingerprint(byte_tokenizer()) != template_fingerprint(other)
    other.chat_template = None
    assert template_fingerprint(other) is None
    assert texts_fingerprint([b"a", b"b"]) == texts_fingerprint(iter([b"a", b"b"])) != texts_fingerprint([b"b", b"a"])
