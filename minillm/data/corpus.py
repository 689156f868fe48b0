"""Plain text as blocks of tokens: documents joined by EOS, cut without overlap."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from minillm.config.data import Corpus as CorpusConfig
from minillm.data.documents import read_documents
from minillm.data.sources import DataError
from minillm.data.tokenization import require_end
from minillm.data.windows import document_ids
from minillm.models.batch import TokenSequence


class Blocks(Sequence[list[int]]):
    """Tokens in blocks of one size; the remainder is left out."""

    def __init__(self, tokens: array, size: int):
        self._tokens, self._size = tokens, size

    def __len__(self) -> int:
        return len(self._tokens) // self._size

    def __getitem__(self, index: int) -> list[int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index % len(self) * self._size
        return self._tokens[start : start + self._size].tolist()


@dataclass(frozen=True)
class Corpus:
    """The blocks that the pre-training loss is taken on. A block's first token is fed; the others are predicted."""

    blocks: Sequence[list[int]]  # of block_size tokens each; the remainder of the last document is left out
    documents: int


def block_text(block: list[int], place: int = 0) -> TokenSequence:
    """A block of plain text as a response to its first id. `place` is its own in the data."""
    return TokenSequence(block[:1], block[1:], key=place)


def load_corpus(config: CorpusConfig, tokenizer: PreTrainedTokenizerBase) -> Corpus:
    """Read and pack. Raises DataError where the text does not fill one block, and for a tokenizer without an end."""
    require_end(tokenizer, "data.corpus")
    tokens, documents = array("q"), 0
    for _, text in read_documents(config):
        tokens += document_ids(tokenizer, text)
        tokens.append(tokenizer.eos_token_id)
        documents += 1
    blocks = Blocks(tokens, config.block_size)
    if not blocks:
        raise DataError(
            f"data.corpus: {len(tokens)} tokens do not fill one block of block_size={config.block_size}; lower it"
        )
    return Corpus(blocks, documents)
