"""Running models for their outputs alone leaves no trace on them."""

import pytest
import torch

from minillm.models.modes import sampling_mode


def test_modes_are_put_back_even_after_an_error(build_model):
    model, other = build_model("llama"), build_model("gpt2")
    model.train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="on the way"), sampling_mode([model, other]):
        assert not any(module.training for module in [*model.modules(), *other.modules()])
        assert not torch.is_grad_enabled()
        raise RuntimeError("on the way")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.is_grad_enabled() and not all(before.values())
    assert not any(module.training for module in other.modules())


def test_buffers_that_a_pass_replaces_can_serve_training_again(build_model, ids):
    """Rotary frequencies that depend on the length are made anew in a forward pass; what inference mode makes is shut
    out of gradients."""
    model = build_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    longer = ids.repeat(1, 8)  # beyond the 64 positions of the configuration
    before = model.model.rotary_emb.inv_freq
    with sampling_mode([model]):
        model(longer)
    assert model.model.rotary_emb.inv_freq is not before, "the pass must have replaced it"
    assert not model.model.rotary_emb.inv_freq.is_inference()
    model(longer).logits.sum().backward()
