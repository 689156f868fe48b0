"""Models built as shapes: how large they are, and what cannot be built."""

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from minillm import UserError
from minillm.planning.sizes import build, count_parameters, decoder_layers, size_of
from tests.planning.small import LAYER, PARAMETERS, SHAPE

TEXT = {key: value for key, value in SHAPE.items() if key != "model_type"} | {"tie_word_embeddings": True}
# a SigLIP tower of one layer over images of four patches, which Gemma 3 averages into one token
VISION = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
GEMMA = {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}


def text(**changes):
    return AutoConfig.for_model(**{**SHAPE, **changes})


def gemma3():
    """Image and text, whose vision tower is initialised from values that fake tensors do not have."""
    language = {"model_type": "gemma3_text", **TEXT, **GEMMA}
    return AutoConfig.for_model(model_type="gemma3", text_config=language, vision_config=VISION, mm_tokens_per_image=1)


def test_weights_are_counted_without_any():
    assert count_parameters(text()) == PARAMETERS
    assert count_parameters(text(tie_word_embeddings=True)) == PARAMETERS - 512 * 64  # tied ones once


def test_an_architecture_stays_as_it_is():
    architecture = text()
    before = architecture.to_json_string()
    with FakeTensorMode():
        assert build(architecture, "bfloat16", "eager").dtype.itemsize == 2
    assert architecture.to_json_string() == before


def test_sizes_of_text():
    with FakeTensorMode():
        size = size_of(build(text(), "bfloat16", "sdpa"), kv_bytes=7)
    assert (size.parameters, size.trained, size.itemsize, size.stored_bytes) == (
        PARAMETERS,
        PARAMETERS,
        2,
        2 * PARAMETERS,
    )
    assert (size.head, size.embeddings, size.layers, size.largest_layer) == (512 * 64, 512 * 64, 2, LAYER)
    assert (size.hidden_size, size.kv_bytes_per_token, size.idle) == (64, 7, 0)


def test_a_model_that_reads_images_too_is_planned_by_its_language_model():
    with FakeTensorMode():
        model = build(gemma3(), "float32", "sdpa")
        size = size_of(model, kv_bytes=0)
    alone = count_parameters(AutoConfig.for_model(model_type="gemma3_text", **TEXT, **GEMMA))
    assert size.layers == len(decoder_layers(model)[2]) == 2
    assert size.idle == size.parameters - alone > 0  # what reads images, which a token of text does not meet


def test_what_transformers_does_not_build_is_one_line():
    message = "clip cannot be planned: Unrecognized configuration class"
    with FakeTensorMode(), pytest.raises(UserError, match=message) as error:
        build(text(model_type="clip"), "float32", "sdpa")
    assert "\n" not in str(error.value)
