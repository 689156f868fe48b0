"""The check that finds architectures that read from one text into the next, and leaves the others alone."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minillm.models.packing import pack_batches
from minillm.models.packing_check import packing_errors, packing_problem
from tests.models.conftest import COMMON, CONFIGS, ROTARY
from tests.pictures import build_processor, build_seeing

WINDOWS = {"head_dim": 8, "sliding_window": 4096}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
OTHERS = {
    "gemma3": ("gemma3_text", ROTARY | WINDOWS),
    "mistral": ("mistral", ROTARY | WINDOWS),
    "olmoe": ("olmoe", ROTARY | EXPERTS),
    "mamba2": ("mamba2", COMMON | {"hidden_size": 24, "num_hidden_layers": 2, "num_heads": 6, "head_dim": 8,
                                   "state_size": 8, "n_groups": 1}),
    "lfm2": ("lfm2", ROTARY | {"layer_types": ["conv", "full_attention"] * 2}),
}  # fmt: skip
# recurrent layers, a convolution before attention, masks without positions, and no positions at all
LEAKING = ("mamba2", "lfm2", "opt", "bloom")
APART = ("llama", "qwen2", "qwen3", "gpt2", "cohere", "phi", "gemma3", "mistral", "olmoe")


def build(name: str, **overrides):
    torch.manual_seed(0)
    model_type, config = (CONFIGS | OTHERS)[name]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config | overrides)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*LEAKING, *APART])
def test_what_leaks_is_found_and_what_does_not_is_left_alone(name, dtype):
    problem = packing_problem(build(name).to(dtype))
    if name in APART:
        assert problem is None
    else:
        assert "computes something else for texts put end to end than for each alone (by " in problem


def test_a_table_of_positions_that_is_read_without_looking_at_them_is_found():
    model = build("gpt2")
    read = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda ids: read(torch.arange(ids.shape[-1])[None])
    first, later = packing_errors(model)
    assert first.max() < 1e-5 and later.min() > 1e-3
    assert packing_problem(model) is not None and packing_problem(model.to(torch.bfloat16)) is not None


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_windows_are_short_while_the_check_runs_and_as_they_were_afterwards(name):
    """Texts of a few tokens would never meet the end of a real window."""
    model, seen = build(name), set()
    model.model.layers[0].register_forward_pre_hook(lambda *_: seen.add(model.config.sliding_window))
    assert packing_problem(model) is None
    assert seen == {3} and model.config.sliding_window == 4096


def test_code_that_cannot_be_run_so_is_a_reason_too():
    model = build("llama")

    def refuse(module, given, named):
        if named.get("attention_mask") is None:
            raise TypeError("no mask")

    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    assert "cannot be run on texts put end to end in float32 on the cpu (TypeError: no mask)" in packing_problem(model)


def test_states_that_are_no_numbers_are_a_problem():
    model = build("llama")
    model.model.norm.register_forward_hook(lambda module, given, output: output * torch.nan)
    assert "nan" in packing_problem(model)


@pytest.mark.parametrize(
    "kind, apart", [("llava", True), ("qwen2_vl", True), ("qwen2_5_vl", True), ("gemma3", True), ("paligemma", False)]
)
def test_texts_of_models_of_images_and_text_are_looked_at_too(kind, apart):
    """PaliGemma reads prompts in both directions, and takes those of a row for one."""
    assert (packing_problem(build_seeing(kind, build_processor(kind))) is None) == apart


def test_a_model_that_is_packed_already_has_nothing_to_be_compared_with():
    model = build("llama")
    pack_batches(model, True)
    with pytest.raises(ValueError, match="packed already"):
        packing_errors(model)
