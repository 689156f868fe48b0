"""Passes over pictures on fake tensors: what a forward pass is given of them, and what a model makes of it.

A picture's tokens are in the lengths of prompts already (`max_prompt_length`). What is counted here is the pass of the
vision tower and the projector, and their place in the embeddings.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from minillm.models.families import decoder, placeholder_id


@dataclass(frozen=True)
class PictureInputs:
    """The inputs of a forward pass for the pictures of one prompt: numbers with their values, and shapes of all else."""

    signature: tuple  # tells two of them apart
    tensors: Mapping[str, Tensor] = field(compare=False, repr=False)  # real ones of numbers, meta tensors of pixels

    @classmethod
    def of(cls, made: Mapping[str, Tensor]) -> "PictureInputs":
        """Of what an image processor makes of the pictures."""
        tensors = {name: one.to("meta") if one.is_floating_point() else one for name, one in made.items()}
        signature = tuple(
            (name, tuple(one.shape), None if one.is_meta else hash(one.numpy().tobytes()))
            for name, one in sorted(tensors.items())
        )
        return cls(signature, tensors)

    @property
    def pixels(self) -> int:
        """Numbers of the pictures as the model is given them, padding included."""
        return sum(one.numel() for one in self.tensors.values() if one.is_meta)

    def repeated(self, prompts: int) -> dict[str, Tensor]:
        """The inputs of so many prompts, one after the other, inside of fake tensors with known values."""
        return {
            name: torch.empty(prompts * len(one), *one.shape[1:], dtype=one.dtype, device="cpu")
            if one.is_meta
            else one.repeat(prompts, *[1] * (one.dim() - 1))
            for name, one in self.tensors.items()
        }


_FLOPS: dict[tuple, int] = {}  # the stages of a run often have the same teacher, and the same pictures


def flops_of(model: PreTrainedModel, inputs: PictureInputs) -> int:
    """FLOPs of a forward pass of vision tower and projector over the pictures of a prompt. Raises as tokens_of does."""
    # its modules, beside its architecture, as they may have adapters or quantised weights
    key = model.config.to_json_string(), model.config._attn_implementation, repr(model), inputs
    if key not in _FLOPS:
        with FlopCounterMode(display=False) as counter:
            tokens_of(model, inputs)
        _FLOPS[key] = counter.get_total_flops()
    return _FLOPS[key]


@torch.no_grad()
def tokens_of(model: PreTrainedModel, inputs: PictureInputs) -> int:
    """The tokens that the pictures of a prompt take in it, for a model of fake tensors with known values.

    Raises whatever the code of the architecture does where it cannot be shown such pictures, or asks for more values.
    """
    look = decoder(model).get_image_features
    shown = inputs.repeated(1)
    shown = {name: one.to(model.dtype) if one.is_floating_point() else one for name, one in shown.items()}
    taken = inspect.signature(look).parameters
    features = look(**{name: one for name, one in shown.items() if name in taken})
    features = getattr(features, "pooler_output", features)
    return sum(one.numel() // one.shape[-1] for one in tree_leaves(features))


def ids_with_pictures(model: PreTrainedModel, batch: int, length: int, count: int, tokens: int) -> Tensor:
    """(B, L) int64: texts that show `count` pictures of `tokens` tokens each, with a token of text before and after each."""
    image = placeholder_id(model.config)
    ids = torch.full((batch, length), 0 if image else 1)
    for first in range(1, count * (tokens + 1), tokens + 1):
        ids[:, first : first + tokens] = image
    return ids
