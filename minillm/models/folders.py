"""A model's folder looked over before anything is allocated: that its files are what their names say, and the weights
those that its configuration describes."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from minillm import UserError
from minillm.models.families import auto_class

# File -> {key: what its value may be}; every file is a JSON object, keys may be missing or null.
_KINDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "config.json": {"model_type": str, "architectures": list, "vocab_size": int, "text_config": dict, "auto_map": dict},
    "generation_config.json": {"eos_token_id": (int, list), "pad_token_id": int, "bos_token_id": int},
    "tokenizer_config.json": {
        "tokenizer_class": str,
        "chat_template": (str, list, dict),
        "added_tokens_decoder": dict,
        "extra_special_tokens": (dict, list),
        "model_max_length": (int, float),
        **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), (str, dict)),
    },
    "special_tokens_map.json": {},
    "added_tokens.json": {},
    "tokenizer.json": {"model": dict, "added_tokens": list},
    "processor_config.json": {"processor_class": str, "image_processor": dict},
    "preprocessor_config.json": {"processor_class": str, "image_processor_type": str},
    "model.safetensors.index.json": {"weight_map": dict},
    "pytorch_model.bin.index.json": {"weight_map": dict},
}
_CALLED = {int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_SHOWN = 3


def check_folder(folder: Path) -> None:
    """Raises UserError, which names the file, for a JSON file of a model that is not of the shape it should be."""
    for name, kinds in _KINDS.items():
        file = folder / name
        if not file.is_file():
            continue
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: not JSON in UTF-8 ({error}); it is cut off or damaged") from None
        if not isinstance(content, dict):
            raise UserError(f"{file}: expected a JSON object, found {json.dumps(content)[:40]}")
        for key, kind in kinds.items():
            value, allowed = content.get(key), kind if isinstance(kind, tuple) else (kind,)
            if value is not None and (not isinstance(value, allowed) or isinstance(value, bool)):
                expected = " or ".join(dict.fromkeys(_CALLED[one] for one in allowed))
                raise UserError(f"{file}: {key} is {json.dumps(value)[:40]}; expected {expected}")


def check_size(folder: Path, architecture: PreTrainedConfig, **options: Any) -> None:
    """Raises UserError where a folder's weights are fewer than its configuration describes, which would be made up.

    `options` are those of from_config.
    """
    files = sorted({file for pattern in _WEIGHTS for file in folder.glob(pattern)})
    if not files:
        raise UserError(f"{folder}: it holds no weights; expected *.safetensors or pytorch_model.bin")
    with torch.device("meta"):
        model = auto_class(architecture).from_config(architecture, **options)
    described = sum(parameter.numel() for parameter in model.parameters())
    shapes: dict[str, tuple[int, ...]] = {}  # as safetensors say them
    held = 0
    for file in files:
        if file.suffix == ".safetensors":
            found = _shapes(file)
            held += sum(map(math.prod, found.values()))
            shapes |= found
        else:
            held += file.stat().st_size  # a byte each at least
    if held < described:
        lacking = [
            f"{name} is {shapes[name]}, not {tuple(one.shape)}" if name in shapes else f"{name} is not there"
            for name, one in model.named_parameters()
            if shapes.get(name) != tuple(one.shape)
        ]
        named = f" ({', '.join(lacking[:_SHOWN])}{', ...' if len(lacking) > _SHOWN else ''})" if shapes else ""
        raise UserError(
            f"{folder}: config.json describes a {type(model).__name__} of {described:,} weights, and its files hold at most "
            f"{held:,}{named}; one of them belongs to another model"
        )


def require_all_weights(path: str, model: PreTrainedModel, found: Mapping[str, Any]) -> None:
    """Raises UserError where a file has not just the tensors that the model has; tied ones may be there once.

    `found` is what from_pretrained says with output_loading_info.
    """
    mismatched = [
        f"{name} is {tuple(there)}, not {tuple(here)}" for name, there, here in sorted(found["mismatched_keys"])
    ]
    said = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for what, names in (
            ("missing", sorted(found["missing_keys"])),
            ("that it does not have", sorted(found["unexpected_keys"])),
            ("of another shape", mismatched),
            ("that could not be read", sorted(map(str, found.get("error_msgs") or []))),
        )
        if names
    ]
    if said:
        prefixes = {name.split(".")[0] for name in found["unexpected_keys"]} & {"_orig_mod", "module"}
        hint = (
            f"names begin with {min(prefixes)}., which torch.compile or a parallel wrapper has put there: save the model "
            "inside of it"
            if prefixes
            else "they belong to another model, or a file is missing"
        )
        raise UserError(f"{path}: its weights are not those of a {type(model).__name__}: {'; '.join(said)}. {hint}")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in a safetensors file, from its header."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(min(length, file.stat().st_size)))
        return {name: tuple(map(int, one["shape"])) for name, one in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(
            f"{file}: not a safetensors file, or one that is cut off ({type(error).__name__}: {error})"
        ) from None
