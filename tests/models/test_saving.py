"""Saved folders load as they were, and a failed save leaves the old one."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

from minillm import UserError
from minillm.models.saving import read_modules, save_model, weights_part, write_modules
from minillm.models.tokenizers import byte_tokenizer
from minillm.storage.snapshot import copied_to_host
from tests.conftest import tiny_llama


@pytest.mark.parametrize("tie", [False, True])
@torch.no_grad()
def test_what_is_saved_loads(build_model, ids, tmp_path, tie):
    model, tokenizer = build_model("llama", vocab_size=257, tie_word_embeddings=tie), byte_tokenizer()
    folder = tmp_path / "deep" / "final"
    save_model(model, tokenizer, folder)
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(ids).logits, model(ids).logits)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.get_vocab() == tokenizer.get_vocab() and loaded.chat_template == tokenizer.chat_template
    assert [path.name for path in folder.parent.iterdir()] == ["final"], "nothing may be left beside it"
    assert list(folder.glob("*.safetensors")) and not list(folder.glob("*.bin"))


def test_every_end_is_in_the_generation_configuration(build_model, tmp_path):
    model = build_model("llama", vocab_size=257)
    model.generation_config.eos_token_id = [256, 10]
    save_model(model, byte_tokenizer(), tmp_path / "model")
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert saved.eos_token_id == [256, 10] and saved.pad_token_id == 256


def test_a_folder_is_replaced_whole(build_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.txt").write_text("old")
    save_model(build_model("llama", vocab_size=257), byte_tokenizer(), folder)
    assert not (folder / "old.txt").exists()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"


def test_a_failed_save_leaves_the_old_folder(build_model, tmp_path, monkeypatch):
    folder, tokenizer, model = tmp_path / "model", byte_tokenizer(), build_model("llama", vocab_size=257)
    save_model(model, tokenizer, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with monkeypatch.context() as patch:
        patch.setattr(type(tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_model(model, tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_model(model, tokenizer, folder)
    assert not AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.any()


def test_generation_settings_that_contradict_each_other_do_not_stop_a_save(build_model, tmp_path):
    """Published models carry them; a run must not fail in its last step."""
    model = build_model("llama", vocab_size=257)
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.6
    save_model(model, byte_tokenizer(), tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.vocab_size == 257


def projector(seed: int, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))
    module[0].bias.requires_grad_(False)
    module[1].running_mean += torch.randn(width)
    return module


def test_modules_come_back_with_what_training_changes(tmp_path):
    """Weights and buffers, but nothing that is frozen: that is made anew by the configuration."""
    ours, theirs = projector(1), projector(2)
    write_modules({"projector": ours}, tmp_path)
    assert [path.name for path in (tmp_path / "modules").iterdir()] == ["projector.safetensors"]
    frozen = theirs[0].bias.clone()
    read_modules({"projector": theirs}, tmp_path)
    assert torch.equal(theirs[0].weight, ours[0].weight) and torch.equal(theirs[1].running_mean, ours[1].running_mean)
    assert torch.equal(theirs[0].bias, frozen) and not torch.equal(frozen, ours[0].bias)


def test_modules_that_are_not_there_or_of_another_shape_are_refused(tmp_path):
    with pytest.raises(UserError, match="projector.safetensors is missing: projector was trained beside the student"):
        read_modules({"projector": projector(1)}, tmp_path)
    write_modules({"projector": projector(1)}, tmp_path)
    with pytest.raises(UserError, match="projector.safetensors holds weights of another projector"):
        read_modules({"projector": projector(1, width=6)}, tmp_path)
    with pytest.raises(UserError, match="holds weights of another projector"):
        read_modules({"projector": projector(1).requires_grad_(False)}, tmp_path)


def test_no_modules_leave_nothing(tmp_path):
    write_modules({}, tmp_path)
    read_modules({}, tmp_path)
    assert not list(tmp_path.iterdir())


def square_experts() -> Qwen3VLMoeForConditionalGeneration:
    """A model whose file has the experts' dimensions in another order than the module, and of one size."""
    text = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2,
            "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 4}  # fmt: skip
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize("make", [square_experts, lambda: tiny_llama(vocab_size=257, tie=True).bfloat16()])
def test_of_a_model_in_pieces_nothing_is_looked_at_but_what_was_gathered(make, tmp_path, monkeypatch):
    """ZeRO-3 leaves empty weights, and gathers one that is asked for by its name while a step is taken."""
    torch.manual_seed(0)
    model = make()
    weights_part(model, byte_tokenizer()).save(tmp_path)
    state = copied_to_host(model.state_dict())
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.data = number, parameter.data.new_empty(0)
    monkeypatch.setattr("minillm.models.saving.gathered_state", lambda model: state)
    monkeypatch.setattr(model, "get_parameter", lambda name: pytest.fail(f"{name} was asked for"))
    part = weights_part(model, byte_tokenizer()).copied()
    (tmp_path / "pieces").mkdir()
    part.save(tmp_path / "pieces")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (tmp_path / "pieces" / name).read_bytes() == (tmp_path / name).read_bytes(), name
