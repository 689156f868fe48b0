"""Tiny random models of images and text with processors of their own, and pictures, all made on the spot."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    SiglipImageProcessorPil,
)
from transformers.processing_utils import ProcessorMixin

from minillm.models.processors import UnreadVideos, tokenizer_with, without_videos
from minillm.models.saving import save_model
from minillm.models.tokenizers import byte_tokenizer

SPREAD = 0.3  # of random weights: distributions far from uniform, and pictures that matter
TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ 'IMAGE' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
TEXT = {
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": SPREAD,
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": SPREAD,
}
SQUARE = {"height": 28, "width": 28}


@dataclass(frozen=True)
class Kind:
    """One architecture: how its processor is made, and its configuration for a vocabulary, a width and a placeholder."""

    processor: Callable[[], ProcessorMixin]
    config: Callable[[int, int, int], dict]


def _tokenizer(*special: str) -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.chat_template = None
    return tokenizer


def _llava() -> ProcessorMixin:
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=SQUARE)
    return LlavaProcessor(
        images,
        _tokenizer("<image>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _llava_onevision() -> ProcessorMixin:
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]])
    return without_videos(LlavaOnevisionProcessor)(
        images,
        _tokenizer("<image>", "<video>"),
        UnreadVideos({"video_processor_type": "LlavaOnevisionVideoProcessor"}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
    )


def _qwen2_vl(processor: type[ProcessorMixin] = Qwen2VLProcessor) -> ProcessorMixin:
    images = Qwen2VLImageProcessorPil(
        patch_size=14, merge_size=2, temporal_patch_size=2, min_pixels=28 * 28, max_pixels=6 * 28 * 28
    )
    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    videos = UnreadVideos({"video_processor_type": "Qwen2VLVideoProcessor"})
    return without_videos(processor)(images, _tokenizer(*special), videos)


def _idefics3() -> ProcessorMixin:
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    special = ("<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    return Idefics3Processor(images, _tokenizer(*special), image_seq_len=1)


def _paligemma() -> ProcessorMixin:
    images = SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 4
    tokenizer = _tokenizer("<image>", "<bos>")
    tokenizer.bos_token = "<bos>"
    return PaliGemmaProcessor(images, tokenizer)


def _gemma3() -> ProcessorMixin:
    images = Gemma3ImageProcessorPil(size=SQUARE, image_seq_length=4)
    tokenizer = _tokenizer("<boi>", "<eoi>", "<soft>")
    tokenizer.add_special_tokens({}, replace_extra_special_tokens=False)
    for name, token in (("boi", "<boi>"), ("eoi", "<eoi>"), ("image", "<soft>")):
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    return Gemma3Processor(images, tokenizer, image_seq_length=4)


def _rotary(vocab_size: int, width: int, **keys) -> dict:
    return {**TEXT, "vocab_size": vocab_size, "hidden_size": width, **keys}


def _qwen2_text(vocab_size: int, width: int, image: int) -> dict:
    rotary = {"rope_type": "default", "rope_theta": 10.0, "mrope_section": [width // 8 - 2, 1, 1]}
    return {
        "text_config": _rotary(vocab_size, width, rope_parameters=rotary),
        "image_token_id": image,
        "video_token_id": image + 1,
        "vision_start_token_id": image - 2,
        "vision_end_token_id": image - 1,
    }


KINDS = {
    "llava": Kind(
        _llava,
        lambda size, width, image: {
            "text_config": {"model_type": "llama", **_rotary(size, width)},
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **VISION},
            "image_token_id": image,
            "vision_feature_layer": -2,
        },
    ),
    "llava_onevision": Kind(
        _llava_onevision,
        lambda size, width, image: {
            "text_config": {"model_type": "qwen2", **_rotary(size, width)},
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
            "image_token_id": image,
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]],
            "vision_feature_layer": -1,
            "vision_aspect_ratio": "anyres_max_9",
        },
    ),
    "qwen2_vl": Kind(
        _qwen2_vl,
        lambda size, width, image: {
            **_qwen2_text(size, width, image),
            "vision_config": {
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": width,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "initializer_range": SPREAD,
            },
        },
    ),
    "qwen2_5_vl": Kind(
        lambda: _qwen2_vl(Qwen2_5_VLProcessor),
        lambda size, width, image: {
            **_qwen2_text(size, width, image),
            "vision_config": {
                "depth": 2,
                "hidden_size": 16,
                "intermediate_size": 24,
                "out_hidden_size": width,
                "num_heads": 2,
                "patch_size": 14,
                "spatial_merge_size": 2,
                "temporal_patch_size": 2,
                "window_size": 56,
                "fullatt_block_indexes": [1],
                "initializer_range": SPREAD,
            },
        },
    ),
    "idefics3": Kind(
        _idefics3,
        lambda size, width, image: {
            "text_config": {"model_type": "llama", **_rotary(size, width)},
            "vision_config": VISION,
            "image_token_id": image,
            "scale_factor": 2,
            "pad_token_id": 256,
        },
    ),
    "paligemma": Kind(
        _paligemma,
        lambda size, width, image: {
            "text_config": {"model_type": "gemma", **_rotary(size, width, head_dim=8)},
            "vision_config": {"model_type": "siglip_vision_model", "projection_dim": width, **VISION},
            "image_token_id": image,
            "projection_dim": width,
        },
    ),
    "gemma3": Kind(
        _gemma3,
        lambda size, width, image: {
            "text_config": _rotary(
                size,
                width,
                head_dim=8,
                sliding_window=6,
                query_pre_attn_scalar=8,
                layer_types=["sliding_attention", "full_attention"],
            ),
            "vision_config": {**VISION, "vision_use_head": False},
            "image_token_id": image,
            "boi_token_index": image - 2,
            "eoi_token_index": image - 1,
            "mm_tokens_per_image": 4,
        },
    ),
}


def build_processor(kind: str) -> ProcessorMixin:
    """A processor over the byte tokenizer, whose chat template takes parts."""
    processor = KINDS[kind].processor()
    around = "<|vision_start|><|image_pad|><|vision_end|>" if kind.startswith("qwen2") else processor.image_token
    processor.chat_template = TEMPLATE.replace("IMAGE", around)
    tokenizer_with(processor)
    return processor


def build_seeing(kind: str, processor: ProcessorMixin, *, width: int = 32, seed: int = 0, **keys) -> PreTrainedModel:
    """A random model in evaluation mode that reads what the processor makes."""
    size, image = len(processor.tokenizer), min(processor.image_token_ids)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(kind, **KINDS[kind].config(size, width, image) | keys)
    )
    with torch.no_grad():  # biases and norms start at 0 and 1: what drops one would not show
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = 256
    return model.eval()


def save_seeing(kind: str, folder: Path, **keys) -> Path:
    """The folder of such a model with its processor."""
    processor = build_processor(kind)
    save_model(build_seeing(kind, processor, **keys), processor.tokenizer, folder)
    return folder


def picture(number: int, width: int = 40, height: int = 30) -> Image.Image:
    """A picture of coarse coloured squares, another one for every number."""
    squares = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((width, height), Image.Resampling.NEAREST)
