"""What a pair of models must share, and what is said where it does not."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from minillm.models.preflight import PreflightError, end_ids, preflight
from minillm.models.tokenizers import byte_tokenizer

CPU = torch.device("cpu")


def words(*names: str, **special) -> PreTrainedTokenizerFast:
    vocabulary = {name: index for index, name in enumerate(names)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=names[0])), **special)


def test_padded_vocabularies_are_cut_to_the_shared_part(build_model):
    student, teacher = build_model("llama", vocab_size=260), build_model("gpt2", vocab_size=264)
    tokenizer = byte_tokenizer()
    models, rows = preflight(student, teacher, tokenizer, byte_tokenizer(), CPU)
    assert models.vocab_size == 260
    assert models.student is student and models.teacher is teacher and models.tokenizer is tokenizer
    table = {name: (ours, theirs) for name, ours, theirs in rows}
    assert table["head rows"] == ("260", "264, cut to 260")
    assert table["model"] == ("LlamaForCausalLM", "GPT2LMHeadModel")


def test_padding_that_is_also_an_eos_is_shown(build_model):
    models, rows = preflight(build_model("llama", vocab_size=257), None, byte_tokenizer(), None, CPU)
    assert models.pad_id == models.eos_ids[0] == 256
    assert ("padding", "'<|end|>', also an EOS", "-") in rows


def test_the_first_differing_token_is_named(build_model):
    ours, theirs = words("a", "b", "c", "d", eos_token="a"), words("a", "b", "x", "y", eos_token="a")
    with pytest.raises(PreflightError, match="id 2 is 'c' for the student and 'x' for the teacher"):
        preflight(build_model("llama"), build_model("llama"), ours, theirs, CPU)


def test_a_missing_token_differs_too(build_model):
    ours, theirs = words("a", "b", eos_token="a"), words("a", "b", "c", eos_token="a")
    with pytest.raises(PreflightError, match="id 2 is None for the student and 'c' for the teacher"):
        preflight(build_model("llama"), build_model("llama"), ours, theirs, CPU)


def test_a_tokenizer_with_ids_beyond_the_heads(build_model):
    with pytest.raises(
        PreflightError, match=r"257 tokens, but the heads share only 71 rows \(student 300, teacher 71\)"
    ):
        preflight(build_model("llama", vocab_size=300), build_model("llama"), byte_tokenizer(), byte_tokenizer(), CPU)


def test_no_end_of_text(build_model):
    model = build_model("llama", eos_token_id=None)
    with pytest.raises(PreflightError, match="names an EOS token"):
        preflight(model, None, words("a", "b"), None, CPU)


def test_every_end_counts_and_the_tokenizers_comes_first(build_model):
    model = build_model("llama")
    model.generation_config.eos_token_id = [2, 1]
    assert end_ids(model, words("a", "b", "c", eos_token="b")) == (1, 2)
    model.generation_config.eos_token_id = 1
    assert end_ids(model, words("a", "b", "c", eos_token="b")) == (1,)
    assert end_ids(model, words("a", "b", "c")) == (1,)


def test_an_end_that_no_head_row_answers_to_is_left_out(build_model):
    """A fresh small vocabulary under a published configuration keeps that one's EOS id, which pads nothing here."""
    model = build_model("llama")
    model.generation_config.eos_token_id = [1, 50256]
    models, _ = preflight(model, None, words("a", "b", "c"), None, CPU)
    assert models.eos_ids == (1,) and models.pad_id == 1


def test_a_tokenizer_without_an_end_takes_the_models(build_model):
    """The data closes reference answers with the tokenizer's EOS."""
    model, tokenizer = build_model("llama"), words("a", "b", "c")
    model.generation_config.eos_token_id = 2
    models, _ = preflight(model, None, tokenizer, None, CPU)
    assert models.eos_ids == (2,) and tokenizer.eos_token_id == 2
