"""Plain text as blocks of tokens: documents joined by EOS, cut without overlap."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from minillm.config.data import Corpus as CorpusConfig
from minillm.data.pydoc import pydoc_documents
from minillm.data.sources import DataError, read_hf, read_texts, texts_of
from minillm.data.tokenization import require_end


@dataclass(frozen=True)
class Corpus:
    """The blocks that the pre-training loss is taken on. A block's first token is fed; the others are predicted."""

    blocks: list[list[int]]  # of block_size tokens each; the remainder of the last document is left out
    documents: int


def load_corpus(config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Read and pack. Raises DataError where the text does not fill one block, and for a tokenizer without an end."""
    require_end(tokenizer, "data.corpus")
    if config.type == "pydoc":
        texts = pydoc_documents()
    else:
        if config.type == "hf":
            found = texts_of(read_hf(config.path, config.name, config.split, streaming=True))
        else:
            found = read_texts(config.path)
        texts = (text for number, (_, text) in enumerate(found) if number >= config.skip)
    tokens, documents = [], 0
    for text in texts:
        if documents == config.limit:
            break
        tokens += tokenizer(text, add_special_tokens=False).input_ids
        tokens.append(tokenizer.eos_token_id)
        documents += 1
    size = config.block_size
    blocks = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    if not blocks:
        raise DataError(f"data.corpus: {len(tokens)} tokens do not fill one block of block_size={size}; lower it")
    return Corpus(blocks, documents)
