"""Long documents a window at a time: the ids of the whole."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minillm.data import windows
from minillm.data.windows import document_ids
from minillm.models.tokenizers import byte_tokenizer

WORDS = [
    "the", "cat", "sat", "on", "a", "mat", "naïve", "façade", "日本語", "🙂🙂", "don't", "\n\n", "    ", "return", "0123456789"
]  # fmt: skip


def prose(words: int) -> str:
    draw = random.Random(3)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", ", ", "", "\n"]) for _ in range(words))


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of a published kind, trained on such prose."""
    if kind == "bytes":
        return byte_tokenizer()
    tokenizer = Tokenizer(models.BPE() if kind != "unigram" else models.Unigram())
    if kind == "byte_level":  # GPT-2, Llama 3, Qwen
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:  # Llama 2 (BPE over whole texts) and T5 (Unigram over words), with a space before every text
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=kind == "unigram")
    trainer = trainers.UnigramTrainer if kind == "unigram" else trainers.BpeTrainer
    tokenizer.train_from_iterator([prose(400)], trainer(vocab_size=300, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("kind", ["bytes", "byte_level", "sentencepiece", "unigram"])
@pytest.mark.parametrize("window", [600, 1000])
def test_a_long_document_has_the_ids_of_the_whole(kind, window, monkeypatch):
    monkeypatch.setattr(windows, "_AGREED", 8)
    tokenizer, text = trained(kind), prose(3000)
    longest, real = [0], windows._tokens
    monkeypatch.setattr(windows, "_tokens", lambda *given: (longest.append(given[-1]), real(*given))[1])
    assert document_ids(tokenizer, text, window=window).tolist() == tokenizer(text, add_special_tokens=False).input_ids
    assert 0 < max(longest) < len(text) / 4


def test_a_word_that_is_longer_than_windows_is_read_as_one(monkeypatch):
    """Of a tokenizer whose cuts depend on where the text begins: three of a kind are one token."""
    monkeypatch.setattr(windows, "_AGREED", 8)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"x": 0, "xx": 1, "xxx": 2}, [("x", "x"), ("xx", "x")]))
    )
    text = "x" * 20_001
    assert document_ids(tokenizer, text, window=601).tolist() == tokenizer(text, add_special_tokens=False).input_ids


def test_a_text_without_a_place_to_cut_is_tokenised_whole(monkeypatch):
    tokenizer, calls = byte_tokenizer(), []
    monkeypatch.setattr(windows, "_agreement", lambda *given: calls.append(given))
    assert document_ids(tokenizer, "ab" * 500, window=20).tolist() == tokenizer("ab" * 500).input_ids and calls
