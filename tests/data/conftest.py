"""Files written on the spot, and a tokenizer that merges across the border of prompt and answer."""

import gzip
import json

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def byte():
    from minillm.models.tokenizers import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def merging():
    """Bytes, one merge of `:` and `b`, and no chat template."""
    alphabet = [*sorted(ByteLevel.alphabet()), ":b", "<end>"]
    tokenizer = Tokenizer(BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[(":", "b")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture
def jsonl(tmp_path):
    """jsonl(*records, name="data.jsonl") -> the path of a file; a string is written as it is."""

    def write(*records, name: str = "data.jsonl") -> str:
        lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
        path = tmp_path / name
        opened = gzip.open(path, "wt") if name.endswith(".gz") else open(path, "w", encoding="utf-8")
        with opened as file:
            file.write("\n".join(lines) + "\n")
        return str(path)

    return write
