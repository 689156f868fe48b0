"""The balance loss against its formula on the routers' own logits, in float64."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minillm import UserError
from minillm.models.access import forward_decoder
from minillm.models.routers import balance_loss, balance_problem, recorded_routing

EXPERTS, CHOSEN = 4, 2
SHAPE = {
    "vocab_size": 71,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": CHOSEN,
    "initializer_range": 0.3,
}
# each names the number of its experts in another way
ARCHITECTURES = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "decoder_sparse_step": 1},
}


def build(name: str):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SHAPE, **ARCHITECTURES[name])).eval()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_is_the_share_of_each_expert_times_its_probability(name, ids):
    """E * sum over experts of (how often a token chooses it) * (its mean probability), over real tokens of all layers."""
    model, read = build(name), []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_pre_hook(lambda gate, inputs: read.append((gate.weight, inputs[0])))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    with recorded_routing(model) as routing:
        forward_decoder(model, ids, mask, None, use_cache=False)
    found = balance_loss(model, routing, mask)
    real = mask.flatten().bool()
    logits = [states.detach().flatten(0, -2).double() @ weight.double().T for weight, states in read]
    probabilities = torch.cat([one[real] for one in logits]).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(CHOSEN).indices, 1.0)
    expected = EXPERTS * (chosen.mean(0) * probabilities.mean(0)).sum()
    assert len(read) == 3 and abs(expected - CHOSEN) > 0.01, "even routers hide mistakes"
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    found.backward()
    assert all(layer.mlp.gate.weight.grad.norm() > 0 for layer in model.model.layers)


def test_a_model_without_routers_is_refused(build_model, ids):
    model = build_model("llama")
    with recorded_routing(model) as routing:
        forward_decoder(model, ids, torch.ones_like(ids), None, use_cache=False)
    assert not routing.logits and not routing.chosen
    with pytest.raises(UserError, match="LlamaForCausalLM has no routers"):
        balance_loss(model, routing, torch.ones_like(ids))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_mixture_of_experts_without_its_balance_loss_is_told_of(name):
    model = build(name)
    assert f"the student, {type(model).__name__}, is a mixture of experts" in balance_problem(model, added=False)
    assert balance_problem(model, added=True) is None


def test_a_dense_model_is_not(build_model):
    assert balance_problem(build_model("llama"), added=False) is None
