"""A tiny random model of any architecture of transformers: its default configuration with small sizes in it."""

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minillm.models.families import auto_class
from minillm.models.tokenizers import byte_tokenizer

ARCHITECTURES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST_WEIGHTS = 10_000_000
LAYERS = 4
SPREAD = 0.1  # added to all weights: initialisers leave some at 0 or 1, where what drops them would not show

# key of a configuration -> its value, where the configuration has the key. Heads: 4 of 8; experts: 4, 2 of them used.
SIZES = {
    **dict.fromkeys(
        "hidden_size d_model n_embd embedding_size word_embed_proj_dim dim attention_hidden_size lru_width "
        "embed_dim projection_dim mamba_hidden_size".split(),
        32,
    ),
    **dict.fromkeys(
        "intermediate_size ffn_dim d_ff n_inner dff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
        "intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size feed_forward_size".split(),
        48,
    ),
    **dict.fromkeys(
        "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size "
        "moe_shared_expert_intermediate_size router_hidden_size".split(),
        16,
    ),
    **dict.fromkeys(
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks "
        "num_decoder_layers num_encoder_layers".split(),
        LAYERS,
    ),
    **dict.fromkeys(
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads".split(),
        4,
    ),
    **dict.fromkeys("num_key_value_heads linear_num_key_heads num_query_groups".split(), 2),
    **dict.fromkeys(
        "head_dim linear_key_head_dim linear_value_head_dim v_head_dim attention_head_dim kv_channels d_kv "
        "attention_head_size head_size".split(),
        8,
    ),
    **dict.fromkeys("num_experts num_local_experts n_routed_experts moe_num_experts".split(), 4),
    **dict.fromkeys("num_experts_per_tok moe_k moe_topk top_k_experts num_selected_experts".split(), 2),
    **dict.fromkeys("n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group".split(), 1),
    **dict.fromkeys("q_lora_rank kv_lora_rank o_lora_rank index_head_dim laurel_rank".split(), 8),
    **dict.fromkeys("qk_rope_head_dim qk_nope_head_dim rotary_dim".split(), 4),
    "num_kv_shared_layers": 0,
    "index_n_heads": 2,
    "index_topk": 64,
    "qk_head_dim": 8,
    **dict.fromkeys("vocab_size vocab_size_per_layer_input padded_vocab_size decoder_vocab_size".split(), 264),
    **dict.fromkeys("max_position_embeddings n_positions n_ctx max_seq_len context_length".split(), 512),
    **dict.fromkeys("sliding_window window_size attention_window_size local_attention attention_chunk_size".split(), 8),
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys("mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank".split(), 8),
    **dict.fromkeys("mamba_n_heads mamba_num_heads n_mamba_heads".split(), 8),
    **dict.fromkeys("mamba_d_head mamba_head_dim mamba_headdim".split(), 8),
    **dict.fromkeys("mamba_n_groups mamba_ngroups n_groups".split(), 1),
    "mamba_d_ssm": 64,
    "image_size": 16,
    "patch_size": 8,
}
# keys that are given although their default says nothing
UNSAID = (
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "num_experts_per_tok",
    "topk_group",
    "n_group",
    "n_shared_experts",
)
# what the sizes of an architecture must be beside the others
OF_ARCHITECTURE = {
    "mamba2": {"num_heads": 8, "head_dim": 8},  # expand * hidden_size of them
    "zamba2": {"n_mamba_heads": 1, "mamba_headdim": 64},
    "xlstm": {"num_heads": 2},
    "reformer": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 16], "is_decoder": True},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    # by default none of few layers has attention
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2)},
    "opt": {"word_embed_proj_dim": 32},
    # what the sizes of pictures have to do with each other
    "llama4": {
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": 16,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            **dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32),
        }
    },
}


def tiny_architecture(model_type: str) -> PreTrainedConfig:
    """The configuration. Raises whatever its class raises for sizes that do not go together."""
    kind = CONFIG_MAPPING[model_type]
    keys = _small(kind) | OF_ARCHITECTURE.get(model_type, {})
    end = byte_tokenizer().eos_token_id
    keys |= {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    if "is_decoder" in kind().to_dict() or hasattr(kind(), "is_decoder"):
        keys["is_decoder"] = True
    return kind(**keys)


def _small(kind: type[PreTrainedConfig]) -> dict:
    default = kind()
    values, others = default.to_dict(), default.attribute_map
    # another name of a key is left out for the key's own, where that is known here
    sizes = {others.get(name, name): size for name, size in SIZES.items() if name in others}
    sizes |= {name: size for name, size in SIZES.items() if name not in others}
    if "kv_lora_rank" in values:  # latent attention: every head has keys of its own, and rotates a part of them
        sizes = {name: size for name, size in sizes.items() if name != "head_dim"} | {"num_key_value_heads": 4}
    keys = {
        name: size
        for name, size in sizes.items()
        if name in values and (isinstance(values[name], int) or values[name] is None and name in UNSAID)
    }
    for name, value in values.items():
        part = vars(default).get(name)
        if isinstance(part, PreTrainedConfig) and isinstance(value, dict):
            keys[name] = {"model_type": part.model_type, **_small(type(part))}
    return keys


def tiny_model(architecture: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """A random model in evaluation mode. Raises ValueError for one that is not tiny, and whatever building raises."""
    with torch.device("meta"), no_init_weights():
        size = sum(one.numel() for one in auto_class(architecture).from_config(architecture).parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"{size:,} weights with the sizes that are known here")
    torch.manual_seed(seed)
    model = auto_class(architecture).from_config(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(SPREAD * torch.randn_like(parameter))
    return model.eval()
