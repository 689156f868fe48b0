"""Tiny random models of several architectures, and what a full right-padded forward pass says of an answer."""

import pytest
import torch
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models

VOCABULARY, EOS = 61, 0
IDS = {"bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS}
ROTARY = {
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # far from uniform
    **IDS,
}


def build(architecture: str, *, vocab_size: int = VOCABULARY, hidden_size: int = 24, seed: int = 1):
    torch.manual_seed(seed)
    if architecture == "gpt2":
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_embd=hidden_size,
                n_layer=2,
                n_head=4,
                n_positions=96,
                initializer_range=0.3,
                **IDS,
            )
        )
    elif architecture == "opt":
        model = OPTForCausalLM(
            OPTConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                word_embed_proj_dim=hidden_size // 2,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=96,
                init_std=0.3,
                **IDS,
            )
        )
    elif architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, hidden_size=hidden_size, **ROTARY))
    elif architecture == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab_size, hidden_size=hidden_size, **ROTARY))
    elif architecture == "cohere":
        model = CohereForCausalLM(
            CohereConfig(vocab_size=vocab_size, hidden_size=hidden_size, logit_scale=0.5, **ROTARY)
        )
    else:
        model = Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                head_dim=8,
                sliding_window=5,
                final_logit_softcapping=4.0,
                attn_logit_softcapping=20.0,
                query_pre_attn_scalar=8,
                **ROTARY,
            )
        )
    # biases and norms start at 0 and 1: a test that drops one would not notice
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def make_models():
    def make(
        architecture: str = "llama",
        *,
        vocab_size: int = VOCABULARY,
        eos_ids: tuple[int, ...] = (EOS,),
        teacher: bool = True,
    ) -> Models:
        return Models(
            student=build(architecture, vocab_size=vocab_size),
            # more vocabulary rows, as larger models of a family have for padding
            teacher=LocalTeacher(build(architecture, vocab_size=vocab_size + 5, hidden_size=32, seed=2))
            if teacher
            else None,
            tokenizer=None,
            vocab_size=vocab_size,
            eos_ids=eos_ids,
            pad_id=EOS,
            device=torch.device("cpu"),
        )

    return make


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator).tolist() for length in (3, 11, 1, 7, 7, 2, 5)]


@pytest.fixture
def eager_logprobs():
    """{role: (T, V) float64} for an answer, from each model's own full logits of the lone, unpadded sequence."""

    @torch.no_grad()
    def logprobs(models: Models, prompt: list[int], response: list[int], role: str) -> Tensor:
        model = models.model(role)
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1, : models.vocab_size]
        return logits.double().log_softmax(-1)

    return logprobs
