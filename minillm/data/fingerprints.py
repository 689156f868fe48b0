"""Fingerprints of what texts are made by, by which something that was written for them is known to belong to others."""

import hashlib
import json
from collections.abc import Iterable

from transformers import PreTrainedTokenizerBase


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything by which a tokenizer makes ids of a text."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    made_of = (
        tokenizer.get_vocab() if fast is None else {**json.loads(fast.to_str()), "padding": None, "truncation": None}
    )
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """SHA-256 of the chat template, None where there is none."""
    template = tokenizer.chat_template
    return None if not template else hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest()


def texts_fingerprint(digests: Iterable[bytes]) -> str:
    """SHA-256 of the digests of texts, in the order of the data."""
    found = hashlib.sha256()
    for digest in digests:
        found.update(digest)
    return found.hexdigest()
