"""Texts to ids: prompts, the answers that follow them, and texts of which only the beginning counts."""

from transformers import PreTrainedTokenizerBase

from minillm.data.sources import DataError
from minillm.data.special_text import is_marked, special_tokens_of

# Of a text whose first n tokens are asked for, so many characters are tokenised at a time, n or more of them as tokens; the
# last tokens before the cut, which the text after it could change, are left out.
_CHARACTERS, _PER_TOKEN, _NEAR_THE_CUT = 65_536, 16, 256


def require_end(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raises DataError for a tokenizer with which no text could be closed."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{name}: the tokenizer has no EOS token, and neither its chat template nor the model's generation "
            "configuration names an end, so no answer could be closed; set eos_token in its tokenizer_config.json"
        )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool, *, first: int | None = None) -> list[int]:
    """Ids of a text, never empty: a model needs a token to start from. Special tokens that are marked in it are text.

    Args:
        first: where only so many of them count, a long text is tokenised as far as that takes, and a few more are returned.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return _beginning(tokenizer, text, special, first) or [start]


def _beginning(tokenizer: PreTrainedTokenizerBase, text: str, special: bool, first: int | None) -> list[int]:
    characters = len(text) if first is None else max(_CHARACTERS, _PER_TOKEN * first)
    while characters < len(text):
        ids = _encode(tokenizer, text[:characters], special)[:-_NEAR_THE_CUT]
        if len(ids) > first:
            return ids
        characters *= 4  # long tokens, or spaces that make none
    return _encode(tokenizer, text, special)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    if is_marked(text):
        ids = special_tokens_of(tokenizer).encode(text, special)
    else:
        ids = tokenizer(
            text, add_special_tokens=special, verbose=False
        ).input_ids  # long prompts are dropped, and counted
    if special and ids and ids[-1] == tokenizer.eos_token_id:  # a tokenizer that closes every text
        ids = ids[:-1]
    return ids


def continuation_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    prompt_ids: list[int],
    response: str,
    special: bool,
    *,
    first: int | None = None,
) -> list[int]:
    """The joint tokenisation less the prompt's, where the prompt's is its beginning; else the response's own.

    Args:
        first: as for encode, of the response.
    """
    joint = encode(tokenizer, prompt + response, special, first=None if first is None else len(prompt_ids) + first)
    if joint[: len(prompt_ids)] == prompt_ids:
        return joint[len(prompt_ids) :]
    return _beginning(tokenizer, response, False, first)


def written_text(tokenizer: PreTrainedTokenizerBase, prompt: list[int], response: list[int]) -> str:
    """The text that an answer adds to its prompt. Bytes that are no UTF-8 are U+FFFD in it."""
    before, both = (tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in (prompt, [*prompt, *response]))
    if both.startswith(before):
        return both[len(before) :]
    return tokenizer.decode(response, clean_up_tokenization_spaces=False)
