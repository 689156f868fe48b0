"""Batches read packed, beside padded ones and beside each sequence alone, in float64 wherever the architecture runs in it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils, modeling_flash_attention_utils
from transformers.integrations.flex_attention import WrappedFlexAttention

from minillm.config.lora import LoraConfig
from minillm.engine.module import TermLoss
from minillm.methods.protocol import Term
from minillm.methods.supervised import cross_entropy
from minillm.models.access import forward_batch, forward_layers, row_hidden
from minillm.models.adapters import add_adapters
from minillm.models.batch import TokenSequence, collate
from minillm.models.modes import train_mode
from minillm.models.packing import fed_mask, pack, pack_batches, reads_packed
from minillm.models.routers import balance_loss, expert_tokens, recorded_routing
from minillm.teachers.local import LocalTeacher
from tests.models.conftest import CONFIGS, ROTARY
from tests.pictures import build_processor, build_seeing

# a short sequence beside long ones, one whose prompt is all that is fed, and two longer than a window of four
SEQUENCES = [
    TokenSequence([5, 6, 9], [7, 8, 9, 3, 4, 11]),
    TokenSequence([3], [4]),
    TokenSequence([12, 13, 14, 15, 5], [16, 3, 7]),
    TokenSequence([21, 3], [6, 2]),
]
WINDOW = {"head_dim": 8, "sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}  # alone runs in float64
ARCHITECTURES = {
    "llama": CONFIGS["llama"],
    "qwen3": CONFIGS["qwen3"],
    "gemma3": ("gemma3_text", ROTARY | WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gpt2": CONFIGS["gpt2"],
    "mistral": ("mistral", ROTARY | WINDOW),
    "olmoe": ("olmoe", ROTARY | EXPERTS),
}


IN_FP32 = {"gemma3": 1e-5}  # norms, by their architecture's code


def build(name: str, attention: str = "sdpa", **overrides):
    torch.manual_seed(0)
    model_type, config = ARCHITECTURES[name]
    experts = config.get("experts_implementation")
    config = AutoConfig.for_model(model_type, **{k: v for k, v in config.items() if k[:8] != "experts_"} | overrides)
    made = {"attn_implementation": attention} | ({} if experts is None else {"experts_implementation": experts})
    return AutoModelForCausalLM.from_config(config, **made).double().eval()


def step(model, *, packed: bool, auxiliary: float = 0.0) -> tuple[Tensor, dict[str, Tensor], TermLoss]:
    """The loss of the sequences, the gradients by name, and the module that took them."""
    pack_batches(model, packed)
    model.zero_grad()
    batch = collate(SEQUENCES, 0)
    assert reads_packed(model, batch) == packed
    module = TermLoss(model, vocab_size=71, backend="torch")
    term = Term("one", batch, cross_entropy, ("student_logprob",), float(batch.tokens), auxiliary=auxiliary)
    loss, _ = module(term)
    loss.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return loss.detach(), found, module


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], *, rounding: float = 1e-10) -> None:
    """Equal to the rounding of float64, or of what an architecture computes in fp32 whatever it is given."""
    assert ours.keys() == theirs.keys() and max(one.abs().max() for one in theirs.values()) > 0.01
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=rounding, atol=rounding, msg=name)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_steps_gradient_is_that_of_padded_batches_and_of_each_sequence_alone(name):
    model, rounding = build(name), IN_FP32.get(name, 1e-10)
    loss, gradient, _ = step(model, packed=True)
    padded, theirs, _ = step(model, packed=False)
    torch.testing.assert_close(loss, padded, rtol=rounding, atol=0)
    assert_same(gradient, theirs, rounding=rounding)
    model.zero_grad()
    for one in SEQUENCES:  # nothing of minillm takes part
        logits = model(input_ids=torch.tensor([one.prompt + one.response])).logits[0, len(one.prompt) - 1 : -1]
        F.cross_entropy(logits, torch.tensor(one.response), reduction="sum").backward()
    alone = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    assert_same(gradient, alone, rounding=rounding)


def test_the_mask_of_eager_attention_keeps_sequences_apart():
    model = build("qwen3", "eager")  # its softmax is in fp32
    assert_same(step(model, packed=True)[1], step(model, packed=False)[1], rounding=1e-5)


def test_layers_that_are_computed_again_see_the_same_sequences():
    model = build("mistral")
    expected = step(model, packed=False)[1]
    train_mode([model], checkpointing=True)
    assert_same(step(model, packed=True)[1], expected)


def test_adapters_have_the_gradient_of_padded_batches():
    pytest.importorskip("peft")
    model = build("qwen3")
    add_adapters(model, LoraConfig(r=3, alpha=6), seed=0)
    model.double()
    gradient = step(model, packed=True)[1]
    assert all("lora_" in name for name in gradient)
    assert_same(gradient, step(model, packed=False)[1])


def test_routers_meet_the_tokens_and_no_padding():
    """Experts are counted for every real token, and the balance loss is the one of those."""
    model = build("olmoe")
    found = {packed: step(model, packed=packed, auxiliary=0.3) for packed in (True, False)}
    assert_same(found[True][1], found[False][1])
    counts = [module.take_expert_tokens() for _, _, module in found.values()]
    batch = collate(SEQUENCES, 0)
    assert torch.equal(*counts) and counts[0].sum(1).tolist() == [2 * sum(batch.widths)] * 4
    pack_batches(model, True)
    with recorded_routing(model) as routing:
        forward_batch(model, batch)
    assert all(len(one) == sum(batch.widths) for one in routing.chosen)
    mask = fed_mask(model, batch)
    torch.testing.assert_close(
        balance_loss(model, routing, mask), balance_loss(model, routing, None), rtol=1e-12, atol=0
    )
    assert torch.equal(expert_tokens(routing, 4, mask), counts[0])


@torch.no_grad()
def test_a_teachers_rows_and_inner_layers_are_those_of_padded_batches():
    model, batch = build("mistral"), collate(SEQUENCES, 0)
    teacher, found = LocalTeacher(model), {}
    for packed in (True, False):
        pack_batches(model, packed)
        found[packed] = [teacher.rows(batch).hidden, *teacher.layers(batch, [0, 2, -1]).values()]
    for ours, theirs in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_hidden_states_stand_where_the_padded_batch_has_their_tokens():
    model, batch = build("llama"), collate(SEQUENCES, 0)
    _, expected = forward_layers(model, batch, (1, -1))
    pack_batches(model, True)
    _, found = forward_layers(model, batch, (1, -1))
    real = batch.attention_mask.bool()
    for layer, states in found.items():
        torch.testing.assert_close(states[real], expected[layer][real], rtol=1e-9, atol=1e-11)
        assert not states[~real].any() and (~real).any()


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=5), st.lists(st.integers(0, 3), max_size=4)),
                min_size=1, max_size=5))  # fmt: skip
def test_every_token_is_packed_once_and_unpacked_to_its_place(pairs):
    batch = collate([TokenSequence(*pair) for pair in pairs], 3)
    packed = pack(batch)
    fed = [prompt + response[:-1] for prompt, response in pairs]
    assert packed.input_ids.tolist() == [sum(fed, [])]
    assert packed.position_ids.tolist() == [[place for ids in fed for place in range(len(ids))]]
    assert [packed.input_ids[0, a:b].tolist() for a, b in zip(packed.bounds, packed.bounds[1:], strict=False)] == fed
    states = packed.unpack(1.0 + packed.input_ids[..., None])
    assert torch.equal(states[..., 0], (1.0 + batch.input_ids) * batch.attention_mask)
    assert packed.pack(batch.attention_mask).all()


def test_a_batch_without_padding_stays_as_it_is(build_model):
    model = build_model("llama")
    pack_batches(model, True)
    assert not reads_packed(model, collate([TokenSequence([1, 2], [3]), TokenSequence([4], [5, 6])], 0))
    assert reads_packed(model, collate([TokenSequence([1, 2], [3]), TokenSequence([4], [5])], 0))
    pack_batches(model, False)
    assert not reads_packed(model, collate([TokenSequence([1, 2], [3]), TokenSequence([4], [5])], 0))


@torch.no_grad()
def test_batches_that_show_pictures_are_read_as_they_are_and_texts_of_the_same_model_packed():
    model = build_seeing("llava", build_processor("llava"))
    shown = {"pixel_values": torch.zeros(1, 3, 28, 28)}
    pictured = collate([TokenSequence([5, 6, 7], [8, 9], extras=shown), TokenSequence([8], [9])], 0)
    texts = collate(SEQUENCES, 0)
    assert not reads_packed(model, pictured)
    expected = row_hidden(model, texts)
    pack_batches(model, True)
    assert reads_packed(model, texts) and not reads_packed(model, pictured)
    torch.testing.assert_close(row_hidden(model, texts), expected, rtol=1e-4, atol=1e-5)


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, dropout_p=0.0,
           window_size=(-1, -1)):  # fmt: skip
    """The interface of flash_attn_varlen_func, (T, heads, d) each, sequence by sequence."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    CALLS.append(cu_seqlens_q.tolist())
    parts = []
    for start, end in zip(cu_seqlens_q.tolist(), cu_seqlens_q.tolist()[1:], strict=False):
        one = [states[start:end].transpose(0, 1) for states in (q, k, v)]
        ahead = torch.arange(end - start)[:, None] - torch.arange(end - start)  # by how much a query is behind a key
        mask = (ahead >= 0) & (ahead <= window_size[0] if window_size[0] >= 0 else ahead >= 0)
        parts.append(F.scaled_dot_product_attention(*one, attn_mask=mask, scale=softmax_scale, enable_gqa=True))
    return torch.cat([part.transpose(0, 1) for part in parts])


CALLS: list[list[int]] = []


@pytest.mark.parametrize("name", ["llama", "mistral", "olmoe"])
def test_the_flash_packages_are_called_with_the_bounds_of_the_sequences(name, monkeypatch):
    """Their kernels need a GPU; what stands in for them here has their interface."""
    flash = modeling_flash_attention_utils
    found = {"_loaded_implementation": "flash_attention_2", "_flash_fn": None, "_flash_varlen_fn": varlen,
             "_flash_with_kvcache_fn": None, "_pad_fn": flash._pad_input, "_unpad_fn": flash._unpad_input,
             "_process_flash_kwargs_fn": flash._lazy_define_process_function(varlen),
             "_process_with_kvcache_kwargs_fn": dict}  # fmt: skip
    for attribute, value in found.items():
        monkeypatch.setattr(flash, attribute, value, raising=False)
    model = build(name)
    expected = step(model, packed=False)[1]
    model.config._attn_implementation = "flash_attention_2"
    CALLS.clear()
    assert_same(step(model, packed=True)[1], expected)
    assert CALLS == [[0, 8, 9, 16, 19]] * model.config.num_hidden_layers


@torch.no_grad()
def test_flex_attention_keeps_sequences_apart(monkeypatch):
    """By torch's own code for it that is not compiled."""
    made = masking_utils.create_block_mask
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda **keys: made(**keys | {"_compile": False}))
    monkeypatch.setattr(WrappedFlexAttention, "__call__", lambda self: flex_attention)
    model, batch = build("mistral").float(), collate(SEQUENCES, 0)
    expected = row_hidden(model, batch)
    model.set_attn_implementation("flex_attention")
    pack_batches(model, True)
    torch.testing.assert_close(row_hidden(model, batch), expected, rtol=1e-4, atol=1e-5)
