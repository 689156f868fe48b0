"""After pruning the configuration alone rebuilds the model: the same names and shapes, and the same function as the layers
that were kept had; what it cannot say is refused before anything is trained."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minillm import UserError
from minillm.models.families import decoder, text_config
from minillm.models.pruning import layer_count, layers_of, prune_layers, pruned_architecture
from tests.pictures import build_processor, build_seeing

IDS = {"vocab_size": 71, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3}
SHAPE = {**IDS, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 6, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
          "n_group": 1, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
          "qk_nope_head_dim": 4, "v_head_dim": 8, "n_shared_experts": 1}  # fmt: skip
TABLES = {"head_dim": 8, "sliding_window": 4, "hidden_size_per_layer_input": 6, "vocab_size_per_layer_input": 71,
          "layer_types": ["sliding_attention", "full_attention"] * 3}  # fmt: skip
# one or more of every kind of thing that a configuration says of its layers: the layers that stay, what it says then
KINDS = {
    "other name of the count": ("mpt", {"vocab_size": 71, "d_model": 24, "n_heads": 4, "n_layers": 6, "max_seq_len": 64},
                                [1, 4], {"n_layers": 2}),
    "another other name": ("gpt2", IDS | {"n_embd": 24, "n_layer": 6, "n_head": 4}, [0, 5], {"n_layer": 2}),
    "indices": ("qwen3_moe", SHAPE | EXPERTS | {"head_dim": 8, "mlp_only_layers": [0, 3]}, [1, 3, 4], {"mlp_only_layers": [1]}),
    "as many indices as layers": ("qwen2_moe", SHAPE | EXPERTS | {"shared_expert_intermediate_size": 16,
                                  "mlp_only_layers": [0, 1, 2, 3, 4, 5]}, [2, 5], {"mlp_only_layers": [0, 1]}),
    "count from the front": ("deepseek_v3", SHAPE | LATENT | {"first_k_dense_replace": 3}, [0, 2, 5], {"first_k_dense_replace": 2}),
    "count from the front, all behind it": ("deepseek_v2", SHAPE | LATENT | {"first_k_dense_replace": 1}, [3, 5],
                                            {"first_k_dense_replace": 0}),
    "first and last index": ("ernie4_5_moe", SHAPE | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16,
                             "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "moe_layer_end_index": 3},
                             [0, 2, 3, 5], {"moe_layer_start_index": 1, "moe_layer_end_index": 2}),
    "an entry a layer": ("gemma2", SHAPE | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}, [1, 2, 4],
                         {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
    "entries, indices and a period": ("llama4_text", SHAPE | {"head_dim": 8, "intermediate_size_mlp": 40, "num_local_experts": 4,
                                      "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
                                      "no_rope_layers": [1, 1, 0, 1, 1, 0], "attention_chunk_size": 32},
                                      [1, 2, 4], {"moe_layers": [0], "no_rope_layers": [1, 0, 1]}),
    "runs of kinds": ("gpt_neo", {**IDS, "hidden_size": 24, "num_layers": 6, "num_heads": 4, "window_size": 4,
                      "max_position_embeddings": 64, "attention_types": [[["global", "local"], 3]]},
                      [1, 4], {"attention_types": [[["local"], 1], [["global"], 1]], "num_layers": 2}),
    "a table of all layers": ("gemma4_text", SHAPE | TABLES, [0, 4, 5], {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}),
    "another table": ("gemma3n_text", SHAPE | TABLES | {"num_kv_shared_layers": 0, "laurel_rank": 4, "altup_num_inputs": 2,
                      "activation_sparsity_pattern": [0.0, 0.5, 0.0, 0.0, 0.5, 0.0]},
                      [1, 2], {"activation_sparsity_pattern": [0.5, 0.0]}),
}  # fmt: skip


def build(model_type: str, keys: dict):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **copy.deepcopy(keys))).eval()


def without_layers(model, keep: list[int], ids):
    """The hidden states of the whole model with the other layers stepped over: the function that is to stay."""
    parent, name, layers = layers_of(model)
    passed = [layer for index, layer in enumerate(layers) if index not in keep]
    hooks = [
        layer.register_forward_hook(
            lambda module, inputs, output: (inputs[0], *output[1:]) if isinstance(output, tuple) else inputs[0]
        )
        for layer in passed
    ]
    with torch.no_grad():
        hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return hidden


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_configuration_alone_rebuilds_it(kind, ids, tmp_path):
    model_type, keys, keep, says = KINDS[kind]
    model = build(model_type, keys)
    expected = without_layers(model, keep, ids)
    planned = pruned_architecture(model.config, keep)
    assert layer_count(model.config) == 6, "planning leaves the architecture as it is"

    prune_layers(model, keep)
    for key, value in says.items():
        assert getattr(text_config(model.config), key) == value
    torch.testing.assert_close(decoder(model)(input_ids=ids, use_cache=False).last_hidden_state, expected)

    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        again = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
        of_plan = AutoModelForCausalLM.from_config(planned)
    shapes = {name: one.shape for name, one in model.state_dict().items()}
    for other in (again, of_plan):
        assert {name: one.shape for name, one in other.state_dict().items()} == shapes
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours, theirs = (one.eval()(input_ids=ids, use_cache=False).logits for one in (model, loaded))
    assert torch.equal(ours, theirs)


REFUSED = {
    "a period that the layers do not follow": ("qwen3_moe", SHAPE | EXPERTS | {"head_dim": 8, "decoder_sparse_step": 2}, [0, 2]),
    "an offset": ("jamba", SHAPE | {"num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 3, "attn_layer_offset": 1,
                  "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 4,
                  "use_mamba_kernels": False}, [0, 2, 5]),
    "keys and values of another layer": ("gemma3n_text", SHAPE | TABLES | {"num_kv_shared_layers": 2, "laurel_rank": 4,
                                         "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 6}, [0, 1, 4]),
    "no number of layers": ("prophetnet", {"vocab_size": 71, "hidden_size": 24, "num_encoder_layers": 3, "num_decoder_layers": 3,
                            "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "encoder_ffn_dim": 40,
                            "decoder_ffn_dim": 40, "max_position_embeddings": 64, "is_decoder": True}, [0, 2]),
    "two layers in one": ("longcat_flash", {**IDS, "hidden_size": 24, "ffn_hidden_size": 40, "expert_ffn_hidden_size": 16,
                          "num_layers": 3, "num_attention_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8,
                          "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "n_routed_experts": 4,
                          "moe_topk": 2, "zero_expert_num": 1}, [0, 1]),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_configuration_cannot_say_is_refused(kind):
    model_type, keys, keep = REFUSED[kind]
    with pytest.raises(UserError, match="student"):
        prune_layers(build(model_type, keys), keep)


def test_layers_that_follow_the_period_stay(ids):
    model = build("qwen3_moe", SHAPE | EXPERTS | {"head_dim": 8, "decoder_sparse_step": 2})
    expected = without_layers(model, [0, 1, 4, 5], ids)
    prune_layers(model, [0, 1, 4, 5])
    with torch.no_grad():
        torch.testing.assert_close(decoder(model)(input_ids=ids, use_cache=False).last_hidden_state, expected)


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "gemma3", "paligemma"])
def test_of_a_model_of_images_and_text_the_language_model_is_pruned(kind):
    model = build_seeing(kind, build_processor(kind))
    towers = {name: one.shape for name, one in model.state_dict().items() if "language_model" not in name}
    prune_layers(model, [1])
    assert layer_count(model.config) == model.config.text_config.num_hidden_layers == 1 == len(layers_of(model)[2])
    assert {name: one.shape for name, one in model.state_dict().items() if "language_model" not in name} == towers
