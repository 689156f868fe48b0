"""Names of modules that get an adapter: what they mean in each architecture, and what is wrong with those refused."""

import pytest

from minillm.models.adapter_targets import target_names
from tests.sweep.tiny_models import tiny_architecture, tiny_model

KEY = r"^student\.lora\.target_modules: "


@pytest.mark.parametrize(
    ("name", "endings"),
    [
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),  # Conv1D; c_proj in attention and in the mlp
        ("opt", {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "project_in", "project_out"}),
        ("bloom", {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
    ],
)
def test_all_linear_layers_but_the_head(build_model, name, endings):
    model = build_model(name)
    names = target_names(model, "all-linear")
    assert {one.rpartition(".")[2] for one in names} == endings
    matrices = {key.removesuffix(".weight") for key, one in model.named_parameters() if one.dim() == 2}
    embeddings = {key for key in matrices if key.rpartition(".")[2] in ("wte", "wpe") or "embed" in key}
    assert set(names) == matrices - embeddings - {"lm_head"}


@pytest.mark.parametrize(("asked", "count"), [(["c_proj"], 8), (["mlp.c_proj"], 4), (["h.0.mlp.c_proj", "c_attn"], 5)])
def test_a_name_is_the_end_of_a_path(build_model, asked, count):
    names = target_names(build_model("gpt2"), asked)
    assert len(names) == count and all(any(name.endswith(f".{one}") for one in asked) for name in names)


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        ("llama", ["lm_head"], "lm_head is the LM head"),
        ("gpt2", ["c_fc", "lm_head"], "lm_head is the LM head"),  # tied
        ("gpt2", ["wte"], "wte is a table of embeddings"),
        ("llama", ["q_prj"], r"has no module q_prj; did you mean q_proj"),
        ("llama", ["proj"], r"has no module proj; did you mean"),  # not a part of a name, only the end of a path
        ("gpt2", ["query_key_value"], r"has no module query_key_value; its linear layers are c_attn, c_proj, c_fc$"),
        (
            "llama",
            ["mlp"],
            r"model\.layers\.0\.mlp is a LlamaMLP, not a linear layer; linear layers in it are gate_proj",
        ),
        ("llama", ["q_proj", "norm"], r"model\.norm is a LlamaRMSNorm, not a linear layer"),
    ],
)
def test_what_is_refused_says_what_to_write(build_model, name, asked, words):
    with pytest.raises(ValueError, match=KEY + ".*" + words):
        target_names(build_model(name), asked)


@pytest.mark.parametrize("kind", ["llama4_text", "phimoe"])
def test_a_router_gets_no_adapter(kind):
    model = tiny_model(tiny_architecture(kind))
    names = target_names(model, "all-linear")
    assert any(one.endswith("q_proj") for one in names) and not any("router" in one for one in names)
    with pytest.raises(ValueError, match=KEY + r".*router is a \w+Router, not a linear layer"):
        target_names(model, ["router"])


def test_a_linear_layer_with_a_forward_of_its_own_gets_one():
    names = target_names(tiny_model(tiny_architecture("falcon")), "all-linear")
    assert {one.rpartition(".")[2] for one in names} == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
