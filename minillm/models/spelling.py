"""The text that each id of a tokenizer stands for, spelled alike whatever kind of tokenizer it is.

Byte-level tokenizers write a space as Ġ and every byte as a letter of its own, sentencepiece ones write ▁ and <0x0A>. Both
become plain text here, in which bytes that are not UTF-8 by themselves are lone surrogates, as Python's surrogateescape has
them. Two ids with one spelling then mean the same text.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from transformers import PreTrainedTokenizerBase

from minillm.models.tokenizers import end_of_turn

ROLES = ("eos", "turn", "bos", "unk", "pad")  # of special tokens; an id that has several counts for the first
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Spelling:
    """A vocabulary as text."""

    names: Mapping[int, str]  # id -> the token as the tokenizer writes it
    texts: Mapping[int, str]  # id -> the text of an ordinary token
    bytes: frozenset[int]  # of these, the ids that stand for a byte and are only used where nothing else fits
    specials: Mapping[int, str]  # id -> the special token as it is written
    roles: Mapping[str, int]  # of ROLES, those that the tokenizer has


def spelling_of(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """The spelling of every id of a tokenizer."""
    added = tokenizer.added_tokens_decoder
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    specials = {index: one.content for index, one in added.items() if one.special}
    specials |= {index: names[index] for index in tokenizer.all_special_ids if index in names}
    byte_level = is_byte_level(tokenizer)
    texts, of_bytes = {}, set()
    for index, name in names.items():
        if index in specials:
            continue
        if index in added:  # written as it is
            texts[index] = added[index].content
        elif byte_level:
            texts[index] = _from_byte_letters(name)
        elif (found := _BYTE.fullmatch(name)) is not None:
            texts[index] = bytes([int(found[1], 16)]).decode("utf-8", "surrogateescape")
            of_bytes.add(index)
        else:
            texts[index] = name.replace("▁", " ")
    found = {
        "eos": tokenizer.eos_token_id,
        "turn": end_of_turn(tokenizer),
        "bos": tokenizer.bos_token_id,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    roles = {role: found[role] for role in ROLES if found[role] is not None}
    return Spelling(names, texts, frozenset(of_bytes), specials, roles)


def is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True for a tokenizer whose tokens are written in the letters that stand for bytes, as GPT-2's are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        return '"ByteLevel"' in backend.to_str().partition('"model"')[0] or "ByteLevel" in str(backend.decoder)
    return hasattr(tokenizer, "byte_decoder")


def _from_byte_letters(name: str) -> str:
    letters = _byte_letters()
    if any(letter not in letters for letter in name):  # not written in bytes after all
        return name
    return bytes(letters[letter] for letter in name).decode("utf-8", "surrogateescape")


@cache
def _byte_letters() -> dict[str, int]:
    """The letter of every byte: itself where it is printable, else the next one from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
