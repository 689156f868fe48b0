"""The roomy cache layer against the one of transformers that it replaces."""

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from minillm.rollout.local.kv_cache import RoomyLayer, StaticLayer, make_cache
from tests.sweep.tiny_models import tiny_architecture, tiny_model


def test_same_keys_and_values_as_a_dynamic_layer():
    torch.manual_seed(0)
    ours, theirs = RoomyLayer(9), DynamicLayer()
    for batch, tokens, kept in ((5, 4, [3, 0, 4, 1]), (4, 1, None), (4, 1, [1]), (1, 2, None)):
        states = [torch.randn(batch, 2, tokens, 3) for _ in range(2)]
        for got, expected in zip(ours.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(got, expected)
        assert ours.get_seq_length() == theirs.get_seq_length() == ours.keys.shape[-2]
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)
        if kept is not None:
            ours.reorder_cache(torch.tensor(kept))
            theirs.reorder_cache(torch.tensor(kept))
    assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    assert ours.keys.shape == (1, 2, 8, 3)


def test_stores_in_place():
    layer = RoomyLayer(50)
    layer.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    before = layer.keys.data_ptr(), layer.values.data_ptr()
    for _ in range(47):
        layer.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
    assert (layer.keys.data_ptr(), layer.values.data_ptr()) == before


def test_more_tokens_than_room():
    layer = RoomyLayer(3)
    layer.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    with pytest.raises(ValueError, match="room for 3 tokens was given token 4"):
        layer.update(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))


def test_a_fixed_layer_writes_where_its_column_says():
    """After the prompts; what no token was written to is 0, whatever was there."""
    torch.manual_seed(0)
    column = torch.tensor([4, 4])
    layer = StaticLayer(12, column)
    for prompt in (4, 3):
        states = [torch.randn(2, 2, prompt, 3) for _ in range(2)]
        for got, expected in zip(layer.update(*states), states, strict=True):
            assert torch.equal(got, expected)
        layer.use(8)
        states = [torch.cat([one, torch.zeros(2, 2, 8 - prompt, 3)], 2) for one in states]
        column.copy_(prompt + torch.tensor([0, 1]))  # of two rows
        for _ in range(2):
            more = [torch.randn(2, 2, 1, 3) for _ in range(2)]
            for place, (got, new) in enumerate(zip(layer.update(*more), more, strict=True)):
                assert got.shape == (2, 2, 8, 3)
                for row, at in enumerate(column.tolist()):
                    states[place][row, :, at] = new[row, :, 0]
                assert torch.equal(got, states[place])
            column.add_(1)
        taken = [torch.randn(1, 2, 2, 3) for _ in range(2)]
        layer.put(torch.tensor([1]), *taken)
        for got, whole, new in zip((layer.keys, layer.values), states, taken, strict=True):
            assert torch.equal(got[0], whole[0]) and torch.equal(got[1, :, 2:], whole[1, :, 2:])
            assert torch.equal(got[1:, :, :2], new)
        layer.clear()
        assert layer.get_seq_length() == 0


def test_bounded_layers_stay_those_of_transformers(make_models):
    layers = make_cache(make_models("gemma2", teacher=False).student, lambda: RoomyLayer(30)).layers
    assert [type(layer) for layer in layers] == [DynamicSlidingWindowLayer, RoomyLayer]
    layers = make_cache(make_models("gpt2", teacher=False).student, lambda: RoomyLayer(30)).layers
    assert [type(layer) for layer in layers] == [RoomyLayer, RoomyLayer]


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("mistral", [DynamicSlidingWindowLayer] * 4),
        ("llama4_text", [DynamicSlidingWindowLayer] * 3 + [RoomyLayer]),  # chunks
        (
            "gemma3",
            [DynamicSlidingWindowLayer] * 4,
        ),  # the text model's file makes the masks, below that of the pictures
        ("moshi", [RoomyLayer] * 4),  # its configuration has a window, which no mask of its code knows
    ],
)
def test_a_window_is_cut_only_where_the_model_masks_it(kind, layers):
    model = tiny_model(tiny_architecture(kind))
    assert [type(layer) for layer in make_cache(model, lambda: RoomyLayer(30)).layers] == layers
