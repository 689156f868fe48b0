"""Tiny random models of the architectures whose heads, caches or layer lists differ."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {"vocab_size": 71, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3}
ROTARY = {
    **COMMON,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": ("llama", ROTARY),
    "qwen2": ("qwen2", ROTARY | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3": ("qwen3", ROTARY | {"head_dim": 8}),
    "gpt2": ("gpt2", COMMON | {"n_embd": 24, "n_layer": 4, "n_head": 4, "n_positions": 64}),
    "opt": (
        "opt",
        {name: ROTARY[name] for name in ROTARY if name not in ("intermediate_size", "num_key_value_heads")}
        | {"ffn_dim": 40, "word_embed_proj_dim": 12, "init_std": 0.3, "do_layer_norm_before": True},
    ),
    "gemma2": (
        "gemma2",
        ROTARY | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    ),
    "cohere": ("cohere", ROTARY | {"logit_scale": 0.25}),
    "granite": ("granite", ROTARY | {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
    "phi": ("phi", {**ROTARY, "num_key_value_heads": 4, "partial_rotary_factor": 1.0}),  # its head has a bias
    "bloom": ("bloom", COMMON | {"hidden_size": 24, "n_layer": 4, "n_head": 4}),  # takes no position_ids
}


def build(name: str, *, seed: int = 0, **overrides):
    model_type, config = CONFIGS[name]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config | overrides))
    with torch.no_grad():  # biases and norms start at 0 and 1: what drops one would not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def build_model():
    """build_model(architecture, seed=0, **config) -> a random model in evaluation mode."""
    return build


@pytest.fixture(scope="session")
def ids():
    """Two rows of ids, (2, 9)."""
    return torch.randint(1, 71, (2, 9), generator=torch.Generator().manual_seed(4))
