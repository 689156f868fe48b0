"""Adapters in models: frozen below, nothing changed at first, merged and written so that others read the same model."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minillm.config.lora import LoraConfig
from minillm.config.models import StudentConfig
from minillm.models.access import head_error
from minillm.models.adapters import add_adapters, has_adapters, load_adapter
from minillm.models.loading import load_student
from minillm.models.saving import save_model, write_frozen
from minillm.models.tokenizers import byte_tokenizer
from minillm.teachers.local import LocalTeacher
from minillm.teachers.preflight import preflight

pytestmark = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")

LORA = LoraConfig(r=3, alpha=6)
CPU = torch.device("cpu")


def adapted(model, lora: LoraConfig = LORA, *, seed: int = 0):
    """The model with adapters that change it."""
    add_adapters(model, lora, seed=seed)
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def adapters(model) -> dict[str, torch.Tensor]:
    return {name: one for name, one in model.named_parameters() if "lora_" in name}


@torch.no_grad()
def test_new_adapters_change_nothing_and_are_all_that_is_trained(build_model, ids):
    model = build_model("llama")
    expected = model(ids).logits
    before = {name: one.clone() for name, one in model.named_parameters()}
    add_adapters(model, LORA, seed=0)
    assert torch.equal(model(ids).logits, expected)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    assert trained == adapters(model).keys() and len(trained) == 4 * 7 * 2
    frozen = {name.replace(".base_layer", ""): one for name, one in model.named_parameters() if name not in trained}
    assert frozen.keys() == before.keys() and all(torch.equal(frozen[name], before[name]) for name in before)
    assert type(model).__name__ == "LlamaForCausalLM" and head_error(model) < 1e-6


def test_they_are_keyed_by_the_seed_and_fp32(build_model):
    models = [build_model("llama").bfloat16() for _ in range(3)]
    state = torch.random.get_rng_state()
    pairs = zip(models, (0, 0, 1), strict=True)
    first, again, other = (adapters(add_adapters(model, LORA, seed=seed)) for model, seed in pairs)
    assert torch.equal(torch.random.get_rng_state(), state)
    name = next(name for name in first if "lora_A" in name)
    assert torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
    assert all(one.dtype == torch.float32 for one in first.values())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2", "phi"])
@torch.no_grad()
def test_what_is_saved_is_whole_and_plain_and_the_adapter_is_pefts(build_model, ids, tmp_path, name):
    """Merged for transformers alone, and the adapter on its base for peft: the same distribution."""
    import peft

    model = adapted(build_model(name, vocab_size=257))
    base = build_model(name, vocab_size=257)
    expected = model(ids).logits
    assert (expected - base(ids).logits).abs().max() > 0.1
    save_model(model, byte_tokenizer(), tmp_path / "model")
    assert torch.equal(model(ids).logits, expected), "saving leaves the model alone"
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not has_adapters(plain) and not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)

    (tmp_path / "base").mkdir()
    write_frozen(model, byte_tokenizer(), tmp_path / "base")
    below = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert all(torch.equal(one, base.state_dict()[key]) for key, one in below.state_dict().items())
    served = peft.PeftModel.from_pretrained(below, tmp_path / "model" / "adapter")
    torch.testing.assert_close(served(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_merging_rounds_once(build_model, tmp_path):
    """W + (alpha / r) B A in float32, to the nearest bfloat16."""
    model = adapted(build_model("gpt2", vocab_size=257).bfloat16())
    save_model(model, byte_tokenizer(), tmp_path)
    layer = model.transformer.h[0].mlp.c_fc  # Conv1D: its weight is (in, out)
    change = 2.0 * layer.lora_B.default.weight.double() @ layer.lora_A.default.weight.double()
    exact = layer.base_layer.weight.double() + change.T
    merged = load_file(tmp_path / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"]
    assert merged.dtype == torch.bfloat16
    assert (merged == exact.bfloat16()).float().mean() > 0.999  # float32 and float64 differ at a tie


def test_an_adapter_comes_back_bit_for_bit_and_only_where_it_belongs(build_model, tmp_path):
    model = adapted(build_model("llama", vocab_size=257))
    save_model(model, byte_tokenizer(), tmp_path)
    again = add_adapters(build_model("llama", vocab_size=257), LORA, seed=5)
    load_adapter(again, tmp_path / "adapter")
    ours, theirs = adapters(model), adapters(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(one.requires_grad for one in theirs.values())
    for other in (LORA.model_copy(update={"r": 2}), LORA.model_copy(update={"target_modules": ["q_proj"]})):
        with pytest.raises(ValueError, match="of other modules or of another rank"):
            load_adapter(add_adapters(build_model("llama"), other, seed=0), tmp_path / "adapter")


def test_the_adapter_names_the_weights_that_others_can_have(build_model, tmp_path, monkeypatch):
    monkeypatch.setattr("minillm.models.loading._load", lambda *_: build_model("llama"))
    for path, init, named in (("org/name", {}, "org/name"), ("org/name", {"init": "prune", "layers": 2}, None),
                              (str(tmp_path), {}, None)):  # fmt: skip
        config = StudentConfig(path=path, revision="v1", lora=LORA, **init)
        settings = load_student(config, output_dir=tmp_path, device=CPU, seed=0).peft_config["default"]
        assert (settings.base_model_name_or_path, settings.revision) == (named, named and "v1")


def test_the_preflight_table_shows_what_is_trained(build_model):
    model = add_adapters(build_model("llama", vocab_size=257), LORA, seed=0)
    counts = [sum(one.numel() for one in part) for part in (adapters(model).values(), model.parameters())]
    _, rows = preflight(
        model, LocalTeacher(build_model("llama", vocab_size=257)), byte_tokenizer(), byte_tokenizer(), CPU
    )
    row = next(row for row in rows if row[0] == "parameters")
    assert row[1] == "{:,} trained of {:,}".format(*counts)
    assert row[2] == f"{counts[1] - counts[0]:,}"
