"""Documents packed into blocks: every token in its order, none twice."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minillm.config.data import DataConfig, HfCorpus, PydocCorpus, TextCorpus
from minillm.data.corpus import load_corpus
from minillm.data.sources import DataError


@given(st.lists(st.text("ab é", max_size=9), min_size=1, max_size=8), st.integers(2, 7))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_token_in_order(byte, jsonl, texts, block_size):
    path = jsonl(*({"text": text} for text in texts))
    stream = [token for text in texts for token in [*byte(text).input_ids, byte.eos_token_id]]
    config = TextCorpus(path=path, block_size=block_size)
    if len(stream) < block_size:
        with pytest.raises(DataError, match=f"{len(stream)} tokens do not fill one block of block_size={block_size}"):
            load_corpus(config, byte)
        return
    corpus = load_corpus(config, byte)
    assert {len(block) for block in corpus.blocks} == {block_size} and corpus.documents == len(texts)
    packed = [token for block in corpus.blocks for token in block]
    assert packed == stream[: len(packed)] and len(stream) - len(packed) < block_size


def test_skip_and_limit_count_documents(byte, jsonl):
    path = jsonl(*({"text": text} for text in ("aa", "bb", "cc", "dd")))
    corpus = load_corpus(TextCorpus(path=path, block_size=3, skip=1, limit=2), byte)
    assert [byte.decode(block) for block in corpus.blocks] == ["bb<|end|>", "cc<|end|>"] and corpus.documents == 2


def test_special_tokens_that_a_document_spells_are_separators(byte, jsonl):
    path = jsonl({"text": "aa<|end|>bb"}, {"text": "cc"})
    (block,) = load_corpus(TextCorpus(path=path, block_size=8), byte).blocks
    a, b, c = (byte(letter).input_ids[0] for letter in "abc")
    assert block == [a, a, byte.eos_token_id, b, b, byte.eos_token_id, c, c]
    assert "special tokens that it spells" in DataConfig.model_fields["corpus"].description


def test_pydoc(byte):
    corpus = load_corpus(PydocCorpus(type="pydoc", block_size=64, limit=20), byte)
    assert corpus.documents == 20 and sum(block.count(byte.eos_token_id) for block in corpus.blocks) in (19, 20)


def test_a_dataset_on_disk(byte, tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"text": text, "url": "x"} for text in ("aa", "bb", "cc", "dd")]).save_to_disk(tmp_path / "set")
    config = HfCorpus(type="hf", path=str(tmp_path / "set"), block_size=3, skip=1, limit=2)
    corpus = load_corpus(config, byte)
    assert [byte.decode(block) for block in corpus.blocks] == ["bb<|end|>", "cc<|end|>"] and corpus.documents == 2


def test_a_dataset_without_texts_is_named(byte, tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"body": "aa"}]).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="row 0: expected a field `text`; found body"):
        load_corpus(HfCorpus(type="hf", path=str(tmp_path / "set"), block_size=3), byte)
