"""One model in the loop: its logits and its positions."""

import pytest
import torch

from minillm.rollout.local.decoder import Decoder, check_positions
from minillm.rollout.local.kv_cache import RoomyLayer, make_cache


@pytest.mark.parametrize("architecture", ["gemma2", "cohere", "opt"])
def test_logits_of_the_shared_vocabulary(make_models, architecture):
    model = make_models(architecture).teacher.model
    shared = model.config.vocab_size - 5
    ids = torch.randint(1, shared, (3, 6))
    decoder = Decoder(model, make_cache(model, lambda: RoomyLayer(8)), vocab_size=shared)
    with torch.no_grad():
        for end in (6, 7, 8):
            expected = model(ids).logits[:, -1, :shared]
            positions = torch.arange(len(ids[0])).expand(3, -1)[:, decoder.cache.get_seq_length() :]
            fed = ids[:, decoder.cache.get_seq_length() :]
            logits = decoder.forward(fed, torch.ones(3, end, dtype=torch.int64), positions)
            torch.testing.assert_close(logits[:, :shared], expected, atol=2e-5, rtol=1e-5)
            assert (logits[:, shared:] == -torch.inf).all()
            logits.zero_()  # sampling works in this memory
            ids = torch.cat([ids, expected.argmax(-1)[:, None]], 1)


def test_half_precision_weights_give_fp32_logits(make_models):
    model = make_models(teacher=False).student.bfloat16()
    ids = torch.randint(1, 61, (2, 5))
    with torch.no_grad():
        decoder = Decoder(model, make_cache(model, lambda: RoomyLayer(5)), vocab_size=61)
        logits = decoder.forward(ids, torch.ones_like(ids), torch.arange(5).expand(2, -1))
        hidden = model.model(ids).last_hidden_state[:, -1]
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, :61], hidden.float() @ model.lm_head.weight.float().T, atol=1e-5, rtol=1e-5)


def test_positions_beyond_a_learned_table(make_models):
    check_positions(make_models("gpt2", teacher=False).student, 96)
    with pytest.raises(ValueError, match="GPT2LMHeadModel has 96 positions, .* needs 97"):
        check_positions(make_models("gpt2", teacher=False).student, 97)
    with pytest.raises(ValueError, match="OPTForCausalLM has 96 positions"):
        check_positions(make_models("opt", teacher=False).student, 97)
    check_positions(make_models("llama", teacher=False).student, 1000)  # rotary: no table that ends
