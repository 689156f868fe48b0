"""A pruned student is the teacher with fewer layers: same weights, tied heads, a cache that is right, a config that loads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from minillm.models.pruning import chosen_layers, layers_of, prune_layers

ARCHITECTURES = ("llama", "qwen2", "gpt2", "opt", "gemma2", "cohere", "bloom")


@given(st.integers(1, 80), st.data())
def test_evenly_spaced_with_first_and_last(total, data):
    count = data.draw(st.integers(1, total))
    kept = chosen_layers(count, total)
    assert len(set(kept)) == count and kept == sorted(kept) and kept[0] == 0
    assert count == 1 or kept[-1] == total - 1
    gaps = {after - before for before, after in zip(kept, kept[1:], strict=False)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    "layers, message",
    [(5, "layers is 5, but the model has 4"), ([0, 4], r"names \[4\], but the model has the layers 0 to 3"),
     ([1, 1, 2], "names a layer twice")],
)  # fmt: skip
def test_impossible_choices(layers, message):
    with pytest.raises(ValueError, match=message):
        chosen_layers(layers, 4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_are_those_chosen(build_model, name):
    model = build_model(name)
    _, _, before = layers_of(model)
    expected = [dict(before[index].state_dict()) for index in (0, 3)]
    prune_layers(model, [3, 0])
    _, _, after = layers_of(model)
    for layer, weights in zip(after, expected, strict=True):
        assert all(torch.equal(value, weights[key]) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_generation_with_the_cache_is_generation_without(build_model, ids, name):
    """Renumbered layer_idx: a stale one would read another layer's keys, or a layer that is not there."""
    model = prune_layers(build_model(name), [1, 3])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_a_saved_pruned_model_loads_as_it_was(build_model, ids, tmp_path, name):
    model = prune_layers(build_model(name), [1, 2])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(layers_of(again)[2]) == 2
    torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-6, rtol=0)


def test_lists_with_an_entry_a_layer_are_cut(build_model):
    model = build_model("gemma2")
    types = model.config.layer_types
    assert types[0] != types[1]
    prune_layers(model, [1, 2])
    assert model.config.layer_types == types[1:3]
    assert model.config.num_hidden_layers == 2


def test_token_ids_are_no_list_of_layers(build_model):
    model = build_model("llama", eos_token_id=[5, 6, 7, 8])
    assert prune_layers(model, 2).config.eos_token_id == [5, 6, 7, 8]


def test_ties_are_kept(build_model):
    model = prune_layers(build_model("llama", tie_word_embeddings=True), 2)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_without_one_list_of_layers_is_refused(build_model):
    model = build_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="0 lists of 7 layers"):
        prune_layers(model, 2)
