"""An upcycled model computes what the dense one does, loads anywhere, and keeps all that the dense configuration says."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from minillm import UserError
from minillm.config.sparse_architecture import upcycled_architecture
from minillm.config.upcycle import SPARSE_FORMS, UpcycleConfig
from minillm.models.routers import balance_loss, experts_of, recorded_routing, routers_of
from minillm.models.upcycling import upcycle
from tests.models.conftest import ROTARY
from tests.pictures import build_processor, build_seeing, picture

GOLDEN = Path(os.environ.get("MINILLM_GOLDEN", "golden"))
LAYERS, EXPERTS = 4, 3
STRETCHED = {"rope_type": "yarn", "rope_theta": 300.0, "factor": 4.0, "original_max_position_embeddings": 8}
# of every dense architecture with a sparse form what it has besides the common keys, far from its defaults
DENSE = {
    "llama": {"head_dim": 10, "tie_word_embeddings": True, "rope_parameters": STRETCHED},
    "mistral": {"sliding_window": 5, "head_dim": 8, "rms_norm_eps": 1e-2},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rope_parameters": STRETCHED},
    "qwen3": {"head_dim": 8, "attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0,
              "tie_word_embeddings": True},
    "olmo2": {"attention_bias": True, "hidden_act": "gelu"},
    "granite": {"attention_bias": True, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
                "attention_multiplier": 0.7, "tie_word_embeddings": True},
    "ernie4_5": {"head_dim": 8, "tie_word_embeddings": False},
}  # fmt: skip


def dense_model(kind: str, **keys):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ROTARY | DENSE.get(kind, {}) | keys))
    with torch.no_grad():  # biases and norms start at 0 and 1: what drops one would not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:  # (2, 12, V)
    """Of texts longer than the windows, one of them padded at the left."""
    ids = torch.randint(1, 71, (2, 12), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits.clone()
    found[1, :3] = 0
    return found


def upcycled(model, *, seed: int = 0, hollow: bool = False, **keys):
    return upcycle(model, UpcycleConfig(**{"num_experts": EXPERTS} | keys), seed=seed, hollow=hollow)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", SPARSE_FORMS)
def test_it_computes_what_the_dense_model_does_and_loads_anywhere(kind, dtype, tmp_path):
    model = dense_model(kind).to(dtype)
    expected = logits(model)
    assert expected.std() > 0.3, "flat distributions hide mistakes"
    every = 2 if SPARSE_FORMS[kind].layer_step else 1
    sparse = upcycled(model, every=every, router_std=3.0)  # routers that are far from even
    routed = [1, 3] if every == 2 else [0, 1, 2, 3]
    (layers,) = (one for one in sparse.modules() if isinstance(one, nn.ModuleList) and len(one) == LAYERS)
    assert [i for i, layer in enumerate(layers) if any(one in experts_of(sparse) for one in layer.modules())] == routed
    # gates that sum to 1 are computed in fp32
    torch.testing.assert_close(logits(sparse), expected, rtol=1e-5, atol=1e-5 if dtype is torch.float32 else 3e-6)
    sparse.save_pretrained(tmp_path)
    eager = {"experts_implementation": "eager"} if dtype is torch.float64 else {}  # grouped products have no float64
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, **eager).eval()
    assert again.config.model_type == SPARSE_FORMS[kind].model_type and "minillm" not in type(again).__module__
    assert torch.equal(logits(again), logits(sparse))
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == bool(DENSE[kind].get("tie_word_embeddings"))


def test_every_expert_is_the_feed_forward_layer_and_may_have_noise(build_model):
    model = build_model("llama")
    before = model.model.layers[2].mlp
    gate_up = torch.cat([before.gate_proj.weight, before.up_proj.weight])
    expected = logits(model)
    plain = upcycled(model).model.layers[2].mlp
    for weight, copied in ((plain.experts.gate_up_proj, gate_up), (plain.experts.down_proj, before.down_proj.weight)):
        assert weight.shape[0] == EXPERTS and all(torch.equal(one, copied) for one in weight)
    noisy, again, other = (upcycled(build_model("llama"), noise=0.1, seed=seed) for seed in (1, 1, 2))
    weight = noisy.model.layers[2].mlp.experts.gate_up_proj.detach()
    differences = weight - gate_up.detach()
    torch.testing.assert_close(differences.std(), 0.1 * gate_up.detach().std(), rtol=0.05, atol=0)
    assert torch.corrcoef(differences.flatten(1)).fill_diagonal_(0).abs().max() < 0.1
    assert torch.equal(weight, again.model.layers[2].mlp.experts.gate_up_proj)
    assert not torch.equal(weight, other.model.layers[2].mlp.experts.gate_up_proj)
    assert 1e-3 < (logits(noisy) - expected).abs().mean() < expected.std()


def test_routers_are_drawn_by_the_seed(build_model):
    one, again, other = (upcycled(build_model("qwen2"), seed=seed, router_std=0.5) for seed in (1, 1, 2))
    weights = [[router.weight.detach() for router, _ in routers_of(model)] for model in (one, again, other)]
    assert torch.stack(weights[0]).std().item() == pytest.approx(0.5, rel=0.2) and len(weights[0]) == LAYERS
    for mine, same, different in zip(*weights, strict=True):
        assert torch.equal(mine, same) and not torch.equal(mine, different)


def test_a_hollow_one_has_the_shapes_and_ties(build_model):
    sparse = upcycled(build_model("llama", tie_word_embeddings=True))
    hollow = upcycled(build_model("llama", tie_word_embeddings=True), hollow=True)
    assert {n: p.shape for n, p in hollow.named_parameters()} == {n: p.shape for n, p in sparse.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("llama", {"attention_bias": True}, "has attention_bias: True, which no mixtral can have"),
        ("llama", {"mlp_bias": True}, "has mlp_bias: True"),
        ("granite", {"mlp_bias": True}, "has mlp_bias: True"),
        ("qwen3", {"max_window_layers": 2}, r"attend in 2 ways \(layer_types\), and those of a qwen3_moe in one"),
        ("ernie4_5", {"use_bias": True}, "has use_bias: True, which no ernie4_5_moe"),
        ("mixtral", {}, "a mixtral is a mixture of experts already"),
        ("olmoe", {}, "a olmoe is a mixture of experts already"),
        ("gemma2", {}, "no architecture that is a gemma2 with experts.*llama, mistral, qwen2"),
    ],
)
def test_what_the_sparse_architecture_cannot_say_is_named(kind, keys, message):
    with pytest.raises(UserError, match=f"^student.init=upcycle: .*{message}"):
        upcycled(dense_model(kind, **keys))


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("qwen2", [0, 2]),  # any list
        ("qwen3", [2, 0]),
        ("qwen3", [0]),
        ("ernie4_5", [1, 3]),  # every second one
        ("ernie4_5", [0]),  # from the first to the first
        ("ernie4_5", [1, 2]),
        ("llama", [3, 1, 0, 2]),  # all of them, which every architecture can say
    ],
)
def test_experts_are_in_the_layers_that_are_listed(kind, layers, tmp_path):
    model = dense_model(kind)
    expected = logits(model)
    sparse = upcycled(model, layers=layers, router_std=3.0)
    torch.testing.assert_close(logits(sparse), expected, rtol=1e-5, atol=1e-5)
    sparse.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(sparse))
    for one in (sparse, again):
        (places,) = (part for part in one.modules() if isinstance(part, nn.ModuleList) and len(part) == LAYERS)
        experts = experts_of(one)
        assert [i for i, layer in enumerate(places) if any(part in experts for part in layer.modules())] == sorted(
            layers
        )


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("llama", {"layers": [0, 2]}, "every layer of a mixtral has experts; .* one of qwen2, qwen3, ernie4_5"),
        ("ernie4_5", {"layers": [0, 2]}, "every n-th layer between .* one of qwen2, qwen3$"),
        ("ernie4_5", {"layers": [0, 1, 3]}, "every n-th layer"),
        ("qwen3", {"layers": [1, 4, 7]}, "the layers 0 to 3, no 4, 7"),
        ("qwen3", {"layers": [1, 2, 1]}, "names 1 more than once"),
        ("qwen3", {"layers": [1], "every": 2}, "and so does `every`"),
    ],
)
def test_layers_that_cannot_have_experts(kind, keys, message):
    with pytest.raises(UserError, match=f"^student.upcycle.layers: .*{message}"):
        upcycled(dense_model(kind), **keys)


@pytest.mark.parametrize(
    ("kind", "every", "message"), [("llama", 2, "every layer of a mixtral"), ("qwen2", 5, "no layer")]
)
def test_steps_that_no_layer_is_at(build_model, kind, every, message):
    with pytest.raises(UserError, match=f"^student.upcycle.every: .*{message}"):
        upcycled(build_model(kind), every=every)


def test_a_model_that_would_compute_something_else_is_refused(build_model):
    model = build_model("llama")
    model.model.layers[1].mlp.act_fn = nn.ReLU()  # as a configuration that another version reads otherwise
    with pytest.raises(UserError, match="MixtralForCausalLM computes something else than this LlamaForCausalLM"):
        upcycled(model)


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_a_model_of_images_and_text_gets_experts_in_its_language_model(kind, tmp_path):
    processor = build_processor(kind)
    model = build_seeing(kind, processor)
    inputs = processor(text=f"{processor.image_token} red?", images=[picture(1)], return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    sparse = upcycled(model)
    assert type(sparse) is type(model) and sparse.config.text_config.model_type in ("mixtral", "qwen2_moe")
    with recorded_routing(sparse) as routing:
        torch.testing.assert_close(sparse(**inputs).logits, expected, rtol=1e-4, atol=1e-5)
    # the architecture of images and text hands no router logits on
    assert len(routing.logits) == len(routing.chosen) == len(experts_of(sparse)) == 2
    balance_loss(sparse, routing, inputs["attention_mask"]).backward()
    assert all(router.weight.grad.norm() > 0 for router, _ in routers_of(sparse))
    sparse.save_pretrained(tmp_path)
    with torch.no_grad():
        again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
        assert torch.equal(again(**inputs).logits, sparse(**inputs).logits)


def test_an_architecture_stays_as_it_was(build_model):
    config = build_model("qwen3").config
    before = config.to_dict()
    assert upcycled_architecture(config, UpcycleConfig()).num_experts == 4
    assert config.to_dict() == before


@pytest.mark.parametrize("case", ["upcycled", "distinct"])
def test_without_drops_it_is_the_layer_of_llava_mod(case):
    """Their layer routes with a capacity; where that drops nothing it is this one, and its balance loss that of top-1."""
    if not (GOLDEN / "4_llavamod_moe.npz").is_file():
        pytest.skip("MINILLM_GOLDEN has no 4_llavamod_moe.npz")
    golden = {name: torch.from_numpy(one) for name, one in np.load(GOLDEN / "4_llavamod_moe.npz").items()}
    told = json.loads((GOLDEN / "4_llavamod_moe.json").read_text())["cases"][case]
    experts, width, hidden = golden["experts_gate_proj.weight"].shape
    shape = ROTARY | {"hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 1,
                      "num_key_value_heads": 1}  # fmt: skip
    sparse = upcycled(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).double(), num_experts=4)
    block = sparse.model.layers[0].mlp
    prefix = "dense" if case == "upcycled" else "experts"
    with torch.no_grad():
        block.gate.weight.copy_(golden["wg"])
        gate_up = torch.cat([golden[f"{prefix}_{one}_proj.weight"] for one in ("gate", "up")], dim=-2)
        block.experts.gate_up_proj.copy_(gate_up)
        block.experts.down_proj.copy_(golden[f"{prefix}_down_proj.weight"])
    x = golden["x"].clone().requires_grad_()
    logits = block.gate(x.flatten(0, 1))[0]
    assert torch.equal(logits.topk(2).indices, torch.stack([golden[f"{case}_first"], golden[f"{case}_second"]], 1))
    y, balance = block(x), load_balancing_loss_func((logits,), experts, 1)
    torch.testing.assert_close(y, golden[f"{case}_y"], rtol=1e-6, atol=1e-6)  # gates are computed in fp32
    assert (
        balance.item() == pytest.approx(told["aux"], rel=1e-6) and told["dropped_first"] == told["dropped_second"] == 0
    )
    ((y * golden["G"]).sum() + 3 * balance).backward()
    found = {"x": x.grad, "wg": block.gate.weight.grad, "down_proj": block.experts.down_proj.grad}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, golden[f"{case}_grad_{name}"], rtol=1e-5, atol=1e-5)
