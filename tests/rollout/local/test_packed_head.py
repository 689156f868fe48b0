"""The head of a decode step from a copy of its weight."""

import pytest
import torch

from minillm.rollout.local.decoder import PACK_AFTER, Decoder
from minillm.rollout.local.kv_cache import RoomyLayer, make_cache
from minillm.rollout.local.packed_head import packed_product


@pytest.mark.parametrize("rows", [1, 5, 32])
def test_the_product_is_that_of_the_weight(rows):
    torch.manual_seed(rows)
    weight, hidden = torch.randn(1003, 48), torch.randn(rows, 48)
    product = packed_product(torch.nn.Parameter(weight)[:1000])
    expected = hidden.double() @ weight[:1000].double().t()
    torch.testing.assert_close(product(hidden).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weight", [torch.zeros(8, 4, dtype=torch.bfloat16), torch.zeros(8, 4, device="meta")])
def test_other_weights_have_no_copy(weight):
    assert packed_product(weight) is None


@torch.no_grad()
def test_steps_before_and_after_the_copy_give_the_same_logits(make_models):
    model = make_models("opt").student  # whose head has a bias where one is put
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, model.lm_head.weight.shape[0]))
    decoder = Decoder(model, make_cache(model, lambda: RoomyLayer(4)), vocab_size=59)
    hidden = torch.randn(3, model.lm_head.weight.shape[1])
    first = decoder.logits(hidden).clone()
    for _ in range(PACK_AFTER):
        last = decoder.logits(hidden)
    assert decoder._product is not None
    torch.testing.assert_close(last, first, atol=1e-5, rtol=1e-5)
    assert bool((last[:, 59:] == -torch.inf).all())
