"""Saved folders load as they were, and a failed save leaves the old one."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer


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
