"""Models that see, for `minillm bench plan`: their architectures, what prepares pictures for them, and a prompt's pictures.

LLaVA's have no image processor, as it reads every picture at the size that its configuration says. The others cut a picture
up by its size: into patches (Qwen-VL), or into tiles beside the whole of it (LLaVA-OneVision, Idefics 3).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers.image_processing_utils import BaseImageProcessor

PATCH = 14  # pixels of a side of what one token of a picture is, where patches are not merged
MERGED = 2  # patches of a side that are one token, for Qwen-VL
SHUFFLED = 3  # the same for Idefics 3
LAYERS = 4  # of a vision tower


@dataclass(frozen=True)
class Sight:
    """One family of models that see, for pictures of `side` pixels: the square that it is shown."""

    keys: Callable[[int, int, int], dict[str, Any]]  # hidden size, heads, side -> keys of the architecture
    processor: Callable[[int], "BaseImageProcessor"] | None  # side ->; None: pixels are the picture's own
    tokens: Callable[[int], int]  # side -> tokens of a picture in a prompt
    text: dict[str, Any]  # keys of the language model


def _tower(hidden: int, heads: int, side: int) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": LAYERS,
            "num_attention_heads": heads, "image_size": side, "patch_size": PATCH}  # fmt: skip


def _merging(heads: int) -> dict[str, Any]:
    return {"depth": LAYERS, "num_heads": heads, "patch_size": PATCH, "temporal_patch_size": 2,
            "spatial_merge_size": MERGED}  # fmt: skip


def _ids(vocab: int) -> dict[str, int]:
    return {
        name: vocab - 2 - place
        for place, name in enumerate(("video_token_id", "vision_start_token_id", "vision_end_token_id"))
    }


def _patches(side: int) -> int:
    return (side // PATCH) ** 2


def _qwen(side: int) -> "BaseImageProcessor":
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGED,
        temporal_patch_size=2,
        min_pixels=(2 * PATCH) ** 2,
        max_pixels=(2 * side) ** 2,
    )


def _onevision(side: int) -> "BaseImageProcessor":
    from transformers import LlavaOnevisionImageProcessorPil

    tile = {"height": side // 2, "width": side // 2}
    return LlavaOnevisionImageProcessorPil(size=tile, image_grid_pinpoints=_grids(side))


def _grids(side: int) -> list[list[int]]:
    return [[side // 2, side], [side, side // 2], [side, side]]


def _idefics(side: int) -> "BaseImageProcessor":
    from transformers import Idefics3ImageProcessorPil

    return Idefics3ImageProcessorPil(size={"longest_edge": side}, max_image_size={"longest_edge": side // 2})


_ENDS = {"bos_token_id": 0, "eos_token_id": 0}  # Qwen's own are beyond a small vocabulary
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]}


def _qwen_sight(vision: Callable[[int, int], dict[str, Any]], **text: int) -> Sight:
    """Qwen-VL's, of which each has a vision tower with keys of its own, by hidden size and side."""
    return Sight(
        lambda hidden, heads, side: {"vision_config": {**_merging(heads), **vision(hidden, side)}},
        _qwen,
        lambda side: _patches(side) // MERGED**2,
        {"rope_parameters": _ROTARY, **_ENDS, **text},
    )


SIGHTS = {
    "llava": Sight(
        lambda hidden, heads, side: {
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": hidden, **_tower(hidden, heads, side)}
        },
        None,
        _patches,
        {"model_type": "llama", "tie_word_embeddings": False},
    ),
    "qwen2_vl": _qwen_sight(
        lambda hidden, side: {"embed_dim": hidden, "hidden_size": hidden, "mlp_ratio": 4},
    ),
    "qwen2_5_vl": _qwen_sight(
        lambda hidden, side: {
            "hidden_size": hidden, "intermediate_size": 4 * hidden, "out_hidden_size": hidden, "window_size": 8 * PATCH,
            "fullatt_block_indexes": [LAYERS - 1],
        },
    ),
    "qwen3_vl": _qwen_sight(
        lambda hidden, side: {
            "hidden_size": hidden, "intermediate_size": 4 * hidden, "out_hidden_size": hidden,
            "num_position_embeddings": _patches(side), "deepstack_visual_indexes": [0, 1],
        },
        head_dim=64,
    ),
    "llava_onevision": Sight(
        lambda hidden, heads, side: {
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **_tower(hidden, heads, side // 2)},
            "image_grid_pinpoints": _grids(side),
            "vision_feature_layer": -1,
        },
        _onevision,
        lambda side: 5 * _patches(side // 2) + side // PATCH,  # and one token for the end of every row
        {"model_type": "qwen2"},
    ),
    "idefics3": Sight(
        lambda hidden, heads, side: {
            "vision_config": _tower(hidden, heads, side // 2),
            "scale_factor": SHUFFLED,
            "pad_token_id": 0,
        },
        _idefics,
        lambda side: 5 * _patches(side // 2) // SHUFFLED**2,
        {"model_type": "llama"},
    ),
}  # fmt: skip


def seeing_architecture(family: str, hidden: int, heads: int, side: int, text: dict[str, Any]) -> dict[str, Any]:
    """The keys of a model whose language model has the keys `text`, and whose placeholder is the last id."""
    sight, vocab = SIGHTS[family], text["vocab_size"]
    ids = _ids(vocab) if family.startswith("qwen") else {}
    return {
        "model_type": family,
        "text_config": {**{key: value for key, value in text.items() if key != "model_type"}, **sight.text},
        "image_token_id": vocab - 1,
        **ids,
        **sight.keys(hidden, heads, side),
    }


def shown(family: str, side: int) -> "tuple[int, dict[str, Tensor]]":
    """The tokens of a picture in a prompt, and what a forward pass takes for it."""
    import torch
    from PIL import Image

    sight = SIGHTS[family]
    if sight.processor is None:
        return sight.tokens(side), {"pixel_values": torch.rand(1, 3, side, side)}
    made = sight.processor(side)(images=[[Image.new("RGB", (side, side), "gray")]], return_tensors="pt")
    return sight.tokens(side), {name: one for name, one in made.items() if name != "rows"}
