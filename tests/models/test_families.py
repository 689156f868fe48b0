"""What opens a model, its decoder and its layers are found by the model's own means, in both families."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from minillm import UserError
from minillm.config.lora import LoraConfig
from minillm.models.access import forward_shown, head_error, last_hidden, lm_head
from minillm.models.adapter_targets import target_names
from minillm.models.adapters import add_adapters
from minillm.models.families import (
    answer_beside_pictures,
    auto_class,
    decoder,
    opens_pictures,
    placeholder_id,
    sees_pictures,
    text_model,
)
from minillm.models.pruning import layers_of
from tests.pictures import KINDS, build_processor, build_seeing

LLAMA4 = {"vocab_size": 71, "hidden_size": 24, "intermediate_size": 40, "intermediate_size_mlp": 40, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2,
          "num_experts_per_tok": 1, "eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0,
          "attention_chunk_size": 32}  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def seeing(request):
    return build_seeing(request.param, build_processor(request.param))


def test_a_decoder_under_another_name_than_its_prefix(ids):
    """Llama 4's text model calls its prefix `language_model`, and its decoder `model`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **LLAMA4)).eval()
    assert decoder(model) is model.model and text_model(model) is model.model
    assert len(layers_of(model)[2]) == 4 and head_error(model) <= 1e-5


def test_a_whole_language_model_inside_is_read_below_its_own_head(ids):
    """Llama 4 puts the pictures in by itself, so what is below the head reads text alone, and says so."""
    vision = {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}  # fmt: skip
    torch.manual_seed(0)
    architecture = AutoConfig.for_model("llama4", text_config=LLAMA4, vision_config=vision, image_token_index=5)
    model = AutoModelForImageTextToText.from_config(architecture).eval()
    assert decoder(model) is model.language_model.model and text_model(model) is model.language_model.model
    assert len(layers_of(model)[2]) == 4 and head_error(model) <= 1e-5 and not sees_pictures(model)
    assert target_names(model, "all-linear")[0].startswith("language_model.model.layers.0.")
    with pytest.raises(UserError, match="Llama4ForConditionalGeneration reads text alone here"):
        forward_shown(model, ids, torch.ones_like(ids), None, {"pixel_values": torch.zeros(1, 3, 28, 28)})


def test_a_model_that_has_nothing_below_its_head_is_refused(build_model, monkeypatch):
    model = build_model("llama")
    monkeypatch.setattr(type(model), "base_model_prefix", "nothing")
    monkeypatch.setattr(model, "children", lambda: iter(()))
    with pytest.raises(UserError, match="LlamaForCausalLM computes its logits without a module below"):
        decoder(model)


def test_the_parts_of_a_model_of_images_and_text(seeing):
    assert opens_pictures(seeing.config) and auto_class(seeing.config) is AutoModelForImageTextToText
    language = seeing.model.text_model if seeing.config.model_type == "idefics3" else seeing.model.language_model
    assert decoder(seeing) is seeing.model and text_model(seeing) is language
    parent, name, layers = layers_of(seeing)
    assert parent is language and name == "layers" and len(layers) == 2
    assert head_error(seeing) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_text_model_opens_as_before_and_takes_no_pictures(build_model, name, ids):
    model = build_model(name)
    assert auto_class(model.config) is AutoModelForCausalLM and not sees_pictures(model)
    with pytest.raises(UserError, match=f"the prompts show pictures, and {type(model).__name__} reads text alone"):
        forward_shown(model, ids, torch.ones_like(ids), None, {"pixel_values": torch.zeros(1, 3, 8, 8)})


def test_what_a_forward_pass_does_not_take_is_refused(seeing, ids):
    """Most swallow arguments that they do not know, and would answer without them."""
    with pytest.raises(UserError, match=f"{type(seeing).__name__} takes no spatial_shapes"):
        forward_shown(seeing, ids, torch.ones_like(ids), None, {"spatial_shapes": torch.zeros(1, 2)})


def test_another_number_of_placeholders_than_the_picture_has_parts_is_named(build_model):
    model = build_seeing("llava", build_processor("llava"))
    row = torch.tensor([[placeholder_id(model.config), 5]])
    with pytest.raises(
        UserError, match="LlavaForConditionalGeneration cannot read the pictures of a batch: .*do not match"
    ):
        forward_shown(model, row, torch.ones_like(row), None, {"pixel_values": torch.zeros(1, 3, 28, 28)})


def test_answers_beside_pictures_have_no_placeholder(seeing):
    """In an answer it would be taken for a part of a picture that is not there. Nothing else changes."""
    ids = torch.arange(1, 7)[None]
    plain = lm_head(seeing)
    answer_beside_pictures(seeing, True)
    banned = lm_head(seeing)
    answer_beside_pictures(seeing, False)
    place = placeholder_id(seeing.config)
    assert banned.bias[place] == -torch.inf and banned.bias.isinf().sum() == 1
    assert banned.weight is plain.weight and lm_head(seeing).bias is plain.bias
    hidden = last_hidden(seeing, ids, torch.ones_like(ids))
    before, after = hidden @ plain.weight.T, hidden @ banned.weight.T + banned.bias
    kept = torch.arange(before.shape[-1]) != place
    assert torch.equal(before[..., kept], after[..., kept]) and (after[..., place] == -torch.inf).all()


@pytest.mark.parametrize("asked", ["all-linear", ["q_proj", "v_proj"]])
def test_adapters_go_into_the_language_model_alone(asked):
    model = build_seeing("llava", build_processor("llava"))
    names = target_names(model, asked)
    assert names and all(name.startswith("model.language_model.layers.") for name in names)
    add_adapters(model, LoraConfig(r=2, alpha=4, target_modules=asked), seed=0)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and not any("vision_tower" in name or "projector" in name for name in trained)


def test_an_adapter_that_only_a_vision_tower_has_room_for_is_refused():
    model = build_seeing("llava", build_processor("llava"))
    with pytest.raises(UserError, match="fc1 is outside of the language model of LlavaForConditionalGeneration"):
        target_names(model, ["fc1"])
