"""Last hidden states times the head are the logits that the whole model gives."""

import math

import pytest
import torch
from torch import nn

from minillm.models.access import head_error, last_hidden, lm_head, padding_error
from tests.models.conftest import CONFIGS

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2", "opt", "gemma2", "cohere", "granite", "phi", "bloom")


def logits_of(model, ids, mask, positions):
    head = lm_head(model)
    logits = last_hidden(model, ids, mask, positions) @ head.weight.T
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.logit_scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_hidden_times_head_is_the_models_logits(build_model, ids, name):
    model = build_model(name)
    expected = model(input_ids=ids).logits
    assert expected.std() > 0.1, "the logits must not be flat"
    torch.testing.assert_close(logits_of(model, ids, torch.ones_like(ids), None), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_left_padding_and_positions_change_nothing(build_model, ids, name):
    """Positions as the decode loop gives them: 0 on the padding, then from 0 upwards."""
    model = build_model(name)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), ids], 1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(logits_of(model, padded, mask, positions)[:, 3:], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_projected_hidden_states_have_the_width_of_the_head(build_model, ids):
    model = build_model("opt")
    assert last_hidden(model, ids, torch.ones_like(ids)).shape == (2, 9, 12)
    assert lm_head(model).weight.shape == (71, 12)


def test_what_the_architectures_do_to_logits(build_model):
    assert lm_head(build_model("cohere")).logit_scale == 0.25
    assert lm_head(build_model("granite")).logit_scale == pytest.approx(1 / 3)
    assert lm_head(build_model("gemma2")).softcap == 3.0
    assert lm_head(build_model("phi")).bias is not None
    plain = lm_head(build_model("llama"))
    assert (plain.bias, plain.logit_scale, plain.softcap) == (None, 1.0, None)


def test_a_wrapped_head_is_refused(build_model):
    model = build_model("llama")
    wrapped = nn.Module()
    wrapped.base_layer = model.lm_head
    model.lm_head = wrapped
    with pytest.raises(ValueError, match="wrapped by an adapter"):
        lm_head(model)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_every_head_is_known(build_model, name, dtype, bound):
    assert head_error(build_model(name).to(dtype)) <= bound


def test_what_a_head_does_unseen_is_measured(build_model):
    model = build_model("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: 3 * output)
    assert head_error(model) == pytest.approx(2 / 3, rel=1e-4)


def test_a_banned_id_is_no_difference_and_a_nan_is(build_model):
    model = build_model("phi")
    with torch.no_grad():
        model.lm_head.bias[5] = -torch.inf
        assert head_error(model) <= 1e-5
        model.lm_head.weight[6] = torch.nan
    assert math.isnan(head_error(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_at_the_right_changes_no_text(build_model, name):
    assert padding_error(build_model(name)) < 1e-5


def test_padding_that_is_read_as_text_is_measured(build_model, monkeypatch):
    model = build_model("llama")
    forward = model.model.forward

    def reversed_in_time(input_ids, attention_mask=None, **rest):  # the first token sees what stands at the right
        output = forward(input_ids=input_ids.flip(1), **rest)
        output.last_hidden_state = output.last_hidden_state.flip(1)
        return output

    monkeypatch.setattr(model.model, "forward", reversed_in_time)
    assert padding_error(model) > 0.05
