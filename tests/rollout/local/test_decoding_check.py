"""What answers otherwise than it scores is refused by name, before a step is taken; what answers alike is not."""

import pytest
import torch

from minillm import UserError
from minillm.models.tokenizers import byte_tokenizer
from minillm.rollout.local import decoding_check
from minillm.rollout.local.decoding_check import BLOCKS, decoding_error, reads_blocks, require_exact_decoding
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.teachers.pair import Models
from tests.sweep.tiny_models import tiny_architecture, tiny_model

ENDS = tuple(range(0, 264, 4))  # a quarter of all tokens, so that rows leave at different steps


def pair(model_type):
    return Models(tiny_model(tiny_architecture(model_type)), None, byte_tokenizer(), 264, ENDS, 0, torch.device("cpu"))


# rotary and learned positions, windows, a window that no mask knows, a softcap, ALiBi, recurrent states alone and beside
# attention, experts
@pytest.mark.parametrize(
    "kind",
    ["llama", "gpt2", "opt", "gemma2", "moshi", "bloom", "mamba", "mamba2", "falcon_mamba", "bamba", "qwen3_moe"],
)
def test_answers_are_drawn_from_what_full_passes_say(kind):
    models = pair(kind)
    prompts = [list(range(5, 16)), [7, 9], list(range(40, 46))]
    answers = LocalRollouts(models).sample(prompts, Sampling(8), keys=range(3), seed=2, batch_size=3)
    assert len({len(answer.response) for answer in answers}) > 1, "some rows have left before others"
    for answer in answers:
        ids = torch.tensor([answer.prompt + answer.response[:-1]])
        with torch.no_grad():
            logits = models.student(input_ids=ids, use_cache=False).logits[0, len(answer.prompt) - 1 :].float()
        expected = logits[:, :264].log_softmax(-1).gather(-1, torch.tensor(answer.response)[:, None])[:, 0]
        torch.testing.assert_close(answer.logprobs, expected, rtol=0, atol=1e-4)


# positions without a look at the padding; no mask at all
@pytest.mark.parametrize("kind", ["bart", "rwkv"])
def test_what_reads_padding_as_text_is_refused(kind):
    models = pair(kind)
    with pytest.raises(UserError, match=rf"student: the logits of {type(models.student).__name__} .* differ .* by \d"):
        LocalRollouts(models).sample([[3, 4]], Sampling(1), keys=[0], seed=0, batch_size=1)


def test_a_cache_that_is_swallowed_is_refused(monkeypatch):
    model = pair("llama").student
    exact = decoding_error(model)
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, past_key_values=None, **rest: forward(*args, **rest))
    assert exact < 1e-5 < 0.05 < decoding_error(model)
    with pytest.raises(UserError, match="teacher: the logits of LlamaForCausalLM"):
        require_exact_decoding("teacher", model)


# keys and values, windows, a state that goes on and two that begin anew
@pytest.mark.parametrize(
    ("kind", "blocks"),
    [("llama", True), ("gpt2", True), ("gemma2", True), ("bloom", True), ("mamba2", True), ("mamba", False),
     ("jamba", False)],
)  # fmt: skip
def test_blocks_behind_a_cache_are_looked_at(kind, blocks):
    model = pair(kind).student
    require_exact_decoding("student", model)
    assert reads_blocks(model) == blocks
    assert (decoding_error(model, BLOCKS) < 1e-5) == blocks


def test_a_block_that_cannot_be_read_is_no_error(monkeypatch):
    model = pair("llama").student
    forward = model.model.forward

    def alone(*arguments, input_ids, past_key_values, **options):
        if past_key_values.get_seq_length() and input_ids.shape[1] > 1:
            raise ValueError("one token at a time")
        return forward(*arguments, input_ids=input_ids, past_key_values=past_key_values, **options)

    assert reads_blocks(model)
    monkeypatch.setattr(
        model.model, "forward", lambda *a, **k: alone(*a, **k) if "past_key_values" in k else forward(*a, **k)
    )
    assert not reads_blocks(model)
    require_exact_decoding("student", model)


# what cannot be run here is judged by its cache
@pytest.mark.parametrize(("kind", "blocks"), [("llama", True), ("gemma2", True), ("mamba2", False), ("bamba", False)])
def test_sharded_models_read_blocks_where_they_keep_keys(kind, blocks, monkeypatch):
    monkeypatch.setattr(decoding_check, "is_sharded", lambda model: True)
    assert reads_blocks(pair(kind).student) == blocks


def test_a_constant_that_all_logits_share_hides_no_difference(monkeypatch):
    model = pair("phi").student  # whose head has a bias
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, past_key_values=None, **rest: forward(*args, **rest))
    error = decoding_error(model)
    model.lm_head.bias.data += 1000
    assert decoding_error(model) == pytest.approx(error, rel=0.01) and error > 0.01


def test_a_cache_that_cannot_be_used_is_one_sentence(monkeypatch):
    models = pair("llama")

    def refuse(*args, **kwargs):
        raise ValueError("no such cache")

    monkeypatch.setattr(models.student.model, "forward", refuse)
    with pytest.raises(UserError, match=r"with a cache in float32 on the cpu \(ValueError: no such cache\)"):
        LocalRollouts(models).check("student")


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe", "gemma2"])
def test_rounding_to_16_bits_is_no_difference(kind):
    require_exact_decoding("student", pair(kind).student.bfloat16())


def test_a_model_is_looked_at_once(monkeypatch):
    models = pair("llama")
    rollouts, asked = LocalRollouts(models), []
    monkeypatch.setattr(
        "minillm.rollout.local.local_rollouts.require_exact_decoding", lambda role, model: asked.append(role)
    )
    for _ in range(2):
        rollouts.sample([[3, 4]], Sampling(1), keys=[0], seed=0, batch_size=1)
    assert asked == ["student"]
