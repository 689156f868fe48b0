"""Special tokens that people type: marked in their texts, so that a template's own are told apart, and encoded as text.

A mark is a pair of Unicode noncharacters around the token. It cannot be forged: whatever a text holds, every special token
in it gets a pair of its own.
"""

import json
import re
import secrets
from typing import Any
from weakref import WeakKeyDictionary

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from minillm.data.sources import DataError
from minillm.models.processors import placeholder_ids, processor_of
from minillm.models.tokenizers import end_of_turn

_FIRST, _LAST = "\ufdd0", "\ufdd1"
# What a special token is called in the tokenizer that reads typed ones as text: nobody can type it.
_RENAMED = f"\ufdd2{secrets.token_hex(8)}{{}}\ufdd3"


class SpecialTokens:
    """The special tokens of a tokenizer, as they are spelled in texts.

    `end_of_turn` is the id with which its chat template closes an answer, None where there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self.names = special_names(tokenizer)
        self._longest_first = tuple(sorted(self.names, key=len, reverse=True))
        self._any = re.compile("|".join(map(re.escape, self._longest_first)) or r"(?!)")
        self._marked = re.compile(f"{_FIRST}({self._any.pattern}){_LAST}")
        self._both = re.compile(f"{self._marked.pattern}|({self._any.pattern})")
        self.end_of_turn = end_of_turn(tokenizer)
        self._renamed: Tokenizer | None = None

    def mark(self, value: Any) -> Any:
        """The texts of a value (a text, or lists and dicts of them), with a mark around every special token."""
        if isinstance(value, str):
            return self._any.sub(f"{_FIRST}\\g<0>{_LAST}", value)
        if isinstance(value, dict):
            return {key: self.mark(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(one) for one in value]
        return value

    def plain(self, text: str) -> str:
        """A text without its marks."""
        return self._marked.sub(r"\1", text)

    def typed(self, text: str) -> list[str]:
        """The special tokens that are marked in a text."""
        return self._marked.findall(text)

    def closing(self, text: str) -> list[tuple[int, str]]:
        """(place, token) of the special tokens that a text ends in, with nothing but space between them."""
        found = []
        while (text := text.rstrip()).endswith(self._longest_first):
            name = next(name for name in self._longest_first if text.endswith(name))
            text = text.removesuffix(name)
            found.append((len(text), name))
        return found[::-1]

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a text, in which marked special tokens are text and all others are themselves.

        Args:
            special: add what the tokenizer puts around a text.

        Raises DataError for a tokenizer that cannot be told to read them as text.
        """
        if self._renamed is None:
            self._renamed = _with_renamed(self._tokenizer, self.names)
        renamed = self._both.sub(lambda found: found[1] or _RENAMED.format(found[2]), text)
        return self._renamed.encode(renamed, add_special_tokens=special).ids


def special_names(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The spellings of the special tokens, but for those that stand for a picture, which a text asks for by saying them."""
    names = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names |= set(tokenizer.all_special_tokens)
    processor = processor_of(tokenizer)
    if processor is not None:
        names -= set(tokenizer.convert_ids_to_tokens(sorted(placeholder_ids(processor))))
    return frozenset(name for name in names if name.strip())


def is_marked(text: str) -> bool:
    """True for a text that may hold marks."""
    return _FIRST in text


_known: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[tuple, SpecialTokens]] = WeakKeyDictionary()


def special_tokens_of(tokenizer: PreTrainedTokenizerBase) -> SpecialTokens:
    """The special tokens of a tokenizer, looked at once as long as it stays the same: some have thousands."""
    now = (len(tokenizer), tuple(tokenizer.all_special_tokens), str(tokenizer.chat_template))
    before, known = _known.get(tokenizer, (None, None))
    if known is None or before != now:
        known = SpecialTokens(tokenizer)
        _known[tokenizer] = (now, known)
    return known


def _with_renamed(tokenizer: PreTrainedTokenizerBase, names: frozenset[str]) -> Tokenizer:
    """The tokenizer with the same ids, in which special tokens have names that nobody types.

    Their usual names are then texts like any other, also to models that know them as pieces (Unigram).
    """
    try:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
    except Exception as error:  # no backend, or one with parts in Python
        raise DataError(
            f"it spells a special token, and {type(tokenizer).__name__} cannot be told to read it as text; take it out, or set "
            "special_tokens: tokens, which makes it one"
        ) from error
    for token in content["added_tokens"]:
        if token["content"] in names:
            token["content"] = _RENAMED.format(token["content"])
    model = content["model"]
    pieces = model["vocab"]
    if isinstance(pieces, dict):
        model["vocab"] = {_RENAMED.format(name) if name in names else name: index for name, index in pieces.items()}
    else:
        model["vocab"] = [[_RENAMED.format(name) if name in names else name, score] for name, score in pieces]
    if model.get("unk_token") in names:
        model["unk_token"] = _RENAMED.format(model["unk_token"])
    return Tokenizer.from_str(json.dumps(content))
