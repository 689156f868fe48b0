"""The text behind every id, of the kinds of tokenizers that there are."""

from tokenizers import AddedToken, Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from minillm.models.spelling import is_byte_level, spelling_of
from minillm.models.tokenizers import byte_tokenizer


def pieces() -> PreTrainedTokenizerFast:
    """A tokenizer of pieces with bytes to fall back on, a token that was added and a chat's end of turn."""
    names = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "▁", "▁the", "é"]
    made = Tokenizer(BPE({name: index for index, name in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_tokens([AddedToken("▁▁raw", special=False), AddedToken("<|end|>", special=True)], special_tokens=False)
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"
    return fast


def test_pieces_their_bytes_and_what_was_added():
    tokenizer = pieces()
    found = spelling_of(tokenizer)
    assert not is_byte_level(tokenizer)
    assert found.texts == {3: "\n", 4: "\udcc3", 5: " ", 6: " the", 7: "é", 8: "▁▁raw"}
    assert found.bytes == {3, 4}
    assert found.specials == {0: "<unk>", 1: "<s>", 2: "</s>", 9: "<|end|>"}
    assert found.roles == {"eos": 2, "turn": 9, "bos": 1, "unk": 0}


def test_every_byte_of_a_byte_level_tokenizer_is_itself():
    tokenizer = byte_tokenizer()
    found = spelling_of(tokenizer)
    assert is_byte_level(tokenizer) and not found.bytes
    written = {index: text.encode("utf-8", "surrogateescape") for index, text in found.texts.items()}
    assert sorted(written.values()) == [bytes([byte]) for byte in range(256)]
    for index, text in list(found.texts.items())[:128]:
        if text.isascii():
            assert tokenizer.decode([index]) == text
    assert found.specials == {256: "<|end|>"} and found.roles == {"eos": 256, "turn": 256, "pad": 256}
