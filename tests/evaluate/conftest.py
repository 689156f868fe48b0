"""A tiny student and a wider teacher with more vocabulary rows, and what eager full logits say of them."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from minillm.models.batch import TokenSequence
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models

VOCABULARY, EOS = 24, 0


class WordTokenizer:
    """Id i is the word w<i>; EOS is the only special token."""

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(f"w{i}" for i in ids if not (skip_special_tokens and i == EOS))


def llama(vocab_size: int, hidden_size: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.4,  # far from uniform
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def make_models():
    def make(*, vocab_size: int = VOCABULARY, teacher: bool = True) -> Models:
        return Models(
            student=llama(vocab_size, 16, seed=1),
            # more vocabulary rows, as Qwen's larger models have for padding
            teacher=LocalTeacher(llama(vocab_size + 8, 24, seed=2)) if teacher else None,
            tokenizer=WordTokenizer(),
            vocab_size=vocab_size,
            eos_ids=(EOS,),
            pad_id=EOS,
            device=torch.device("cpu"),
        )

    return make


@pytest.fixture
def eager_logprobs():
    @torch.no_grad()
    def logprobs(model, sequence: TokenSequence, vocab_size: int = VOCABULARY) -> Tensor:
        """(T, V) float64 log-probabilities at the T response tokens, from the model's own full logits."""
        prompt, response = sequence.prompt, sequence.response
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, :vocab_size]
        return logits.double().log_softmax(-1)

    return logprobs
