"""Families of models: text alone, and image and text. What they differ in is found by each model's own means."""

import inspect
from collections.abc import Mapping
from functools import cache
from weakref import WeakSet

from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from minillm import UserError
from minillm.kernels.model_heads import model_body

# Architectures that read a prompt in both directions and an answer from left to right: token_type_ids are 0 and 1.
_PREFIX_READERS = {"paligemma"}
_answering_beside_pictures: WeakSet[nn.Module] = WeakSet()


def opens_pictures(architecture: PreTrainedConfig) -> bool:
    """True where models of an architecture take pictures beside text."""
    listed = architecture.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return listed and getattr(architecture, "vision_config", None) is not None


def auto_class(architecture: PreTrainedConfig) -> type[AutoModelForCausalLM | AutoModelForImageTextToText]:
    """The class of transformers that opens models of an architecture."""
    return AutoModelForImageTextToText if opens_pictures(architecture) else AutoModelForCausalLM


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The part of a configuration that describes the language model; all of it where there is nothing else."""
    return config.get_text_config(decoder=True)


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The module below the LM head: it takes ids, pictures too in its family, and gives last hidden states.

    Where a model of images and text has a whole language model inside, head and all (Llama 4), it is the one of that,
    which takes ids alone. Raises UserError where there is none.
    """
    try:
        return model_body(model)
    except ValueError as error:
        raise UserError(str(error)) from error


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The language model's layers with their embeddings: `decoder` without vision towers and projectors."""
    body = decoder(model)
    found = body.get_decoder()
    return found if isinstance(found, PreTrainedModel) else body


def sees_pictures(model: PreTrainedModel) -> bool:
    """True where a model takes pictures in its prompts."""
    listed = opens_pictures(model.config) and placeholder_id(model.config) is not None
    return listed and "pixel_values" in _arguments(model)


def placeholder_id(config: PreTrainedConfig) -> int | None:
    """The id that stands in a prompt where a part of a picture is; None for an architecture without one."""
    return getattr(config, "image_token_id", None)


def picture_positions(model: PreTrainedModel, input_ids: Tensor) -> Tensor:  # (B, L) int64 -> (B, L) bool
    """The places at which a model reads parts of pictures instead of tokens."""
    return input_ids == placeholder_id(model.config)


def answer_beside_pictures(model: PreTrainedModel, beside: bool) -> None:
    """Say whether answers of a model may stand beside pictures: then none of its tokens is a placeholder of one.

    A placeholder in an answer would be taken for a part of a picture that is not there. Student and teacher must agree:
    what one of them gives no probability, the other must not give any.
    """
    (_answering_beside_pictures.add if beside else _answering_beside_pictures.discard)(model)


def banned_id(model: PreTrainedModel) -> int | None:
    """The id that has no probability in a model's answers: see answer_beside_pictures."""
    return placeholder_id(model.config) if model in _answering_beside_pictures else None


def require_sight(model: PreTrainedModel, extras: Mapping[str, Tensor]) -> None:
    """Raises UserError where a model is given what its forward pass does not take.

    Most text models swallow unknown arguments silently, and would answer without the picture.
    """
    if not extras:
        return
    if not sees_pictures(model):
        raise UserError(
            f"the prompts show pictures, and {type(model).__name__} reads text alone here; choose another model of images and "
            "text, or data without pictures"
        )
    unknown = sorted(set(extras) - _arguments(model))
    if unknown:
        raise UserError(f"{type(model).__name__} takes no {', '.join(unknown)}, which its prompts come with")


def token_kinds(
    model: PreTrainedModel,
    input_ids: Tensor,  # (B, L) int64
    prompt: Tensor | None,  # (B, L) bool, which tokens are the prompt's; None where that is not known
) -> dict[str, Tensor]:  # (B, L) int64 each
    """The marks of every token that a model of images and text asks for, by the names of its arguments."""
    if not sees_pictures(model):
        return {}
    taken = _arguments(model) & {"mm_token_type_ids", "token_type_ids"}
    if model.config.model_type in _PREFIX_READERS:
        return {} if prompt is None else {"token_type_ids": (~prompt).long()}
    return dict.fromkeys(taken, picture_positions(model, input_ids).long())


def own_positions(
    model: PreTrainedModel,
    input_ids: Tensor,  # (B, L) int64
    attention_mask: Tensor,  # (B, L)
    inputs: Mapping[str, Tensor],  # of the forward pass: extras and token kinds
) -> tuple[Tensor, Tensor] | None:  # (3, B, L) and (B, 1), int64
    """The positions of an architecture that counts a picture's tokens along its sides, and what to add to the number of
    a later token; None for one that counts every token once."""
    number = getattr(decoder(model), "get_rope_index", None)
    if number is None or not any(name.endswith("grid_thw") for name in inputs):
        return None
    taken = inspect.signature(number).parameters
    positions, shift = number(
        input_ids, attention_mask=attention_mask, **{name: one for name, one in inputs.items() if name in taken}
    )
    return positions, shift.view(-1, 1)


def packed_positions(model: PreTrainedModel, position_ids: Tensor) -> Tensor:  # (1, T) -> (1, T) or (4, 1, T), int64
    """Positions of texts put end to end, as an architecture takes them that finds by them where a text begins.

    One that counts a picture's tokens along its sides takes those of the text before those of the sides.
    """
    counts_sides = getattr(decoder(model), "get_rope_index", None) is not None
    return position_ids.expand(4, *position_ids.shape) if counts_sides else position_ids


def cache_argument(model: PreTrainedModel) -> str:
    """The name under which a model takes a cache. Models swallow other names silently, and begin anew with every token."""
    return "cache_params" if _recurrent(model) else "past_key_values"


def cache_mask(
    model: PreTrainedModel,
    attention_mask: Tensor,  # (B, tokens so far)
    fed: int,
) -> Tensor:  # (B, tokens so far) or (B, fed)
    """The mask beside a cache: of all tokens so far, for a model that keeps a state and no tokens of those that are fed."""
    return attention_mask[:, -fed:] if _recurrent(model) else attention_mask


def _recurrent(model: PreTrainedModel) -> bool:
    return "cache_params" in _arguments(model) and "past_key_values" not in _arguments(model)


def _arguments(model: PreTrainedModel) -> frozenset[str]:
    return _parameters(type(decoder(model)))


@cache
def _parameters(architecture: type[PreTrainedModel]) -> frozenset[str]:
    return frozenset(inspect.signature(architecture.forward).parameters)
