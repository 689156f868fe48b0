"""Mixtures of experts in a plan: shapes for every dtype, and a token that meets few of the weights."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from minillm.planning.experts import idle_weights
from minillm.planning.ledger import Ledger
from minillm.planning.sizes import build, size_of
from minillm.planning.speed import forward_flops

HIDDEN, INNER, EXPERTS, REACHED, LAYERS = 64, 32, 8, 2, 2
SHAPE = {"hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "num_experts_per_tok": REACHED,
         "tie_word_embeddings": False}  # fmt: skip
# one with gate and up as one weight, one with biases and weights that lie the other way
KINDS = {
    "qwen3_moe": {"num_experts": EXPERTS, "head_dim": 16},
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 16},
}


def architecture(kind: str):
    return AutoConfig.for_model(model_type=kind, **SHAPE, **KINDS[kind])


def run(model, *, backward: bool) -> None:
    ids = torch.zeros(2, 24, dtype=torch.int64)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    if backward:
        hidden.sum().backward()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_dtype_runs_forward_and_backward_without_values(kind, dtype):
    """transformers' own grouped product has a shape-only form for bfloat16 alone."""
    with FakeTensorMode():
        model = build(architecture(kind), dtype, "eager")
        run(model, backward=True)
    for name, parameter in model.base_model.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name


@pytest.mark.parametrize("backward", [False, True])
def test_it_holds_what_the_products_of_transformers_hold(backward):
    """In bfloat16, in which those run without values as well."""
    peaks = []
    for planned in (True, False):
        with FakeTensorMode(), Ledger() as ledger:
            if planned:
                model = build(architecture("qwen3_moe"), "bfloat16", "eager")
            else:
                with no_init_weights():
                    model = AutoModelForCausalLM.from_config(
                        architecture("qwen3_moe"), dtype=torch.bfloat16, attn_implementation="eager"
                    )
            before, moment = ledger.total, ledger.moment
            run(model, backward=backward)
            peaks.append(ledger.most_since(moment) - before)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_a_token_meets_the_experts_that_it_is_sent_to():
    with FakeTensorMode():
        model = build(architecture("qwen3_moe"), "float32", "eager")
        run(model, backward=False)
        size = size_of(model, kv_bytes=0)
    expert = 3 * HIDDEN * INNER
    assert idle_weights(model) == size.idle == LAYERS * (EXPERTS - REACHED) * expert
    met = size.parameters - size.idle - size.embeddings - size.head
    assert forward_flops(size, tokens=1, context=0) == 2 * met


def test_a_model_without_experts_has_none_idle():
    with FakeTensorMode():
        model = build(AutoConfig.for_model(model_type="llama", **SHAPE), "float32", "eager")
        run(model, backward=False)
    assert idle_weights(model) == 0
