"""The sizes of a model, from its architecture alone."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from minillm import UserError
from minillm.models.access import lm_head
from minillm.models.attention import with_attention
from minillm.models.families import auto_class
from minillm.models.parts import weights_of
from minillm.models.pruning import layers_of
from minillm.planning.experts import IMPLEMENTATION, idle_weights
from minillm.planning.picture_passes import PictureInputs, flops_of


@dataclass(frozen=True)
class ModelSize:
    """Counts of one model."""

    parameters: int  # adapters too
    itemsize: int  # bytes of a weight that is not quantised
    stored_bytes: int  # of all weights
    head: int  # weights of the LM head
    embeddings: int  # weights that no matrix product reads: token and position tables apart from a tied head
    layers: int
    largest_layer: int  # weights of the layer that has most
    hidden_size: int
    kv_bytes_per_token: int  # of one sequence, all layers
    trained: int  # weights that receive a gradient
    idle: int = 0  # weights that a token does not meet: of other experts, of what reads images
    frozen: bool = False  # some of those that a token meets receive no gradient
    pictures: float = 0.0  # FLOPs of a forward pass over the pictures of a prompt, in vision tower and projector
    pictures_frozen: bool = False  # which receives no gradient


def count_parameters(architecture: PreTrainedConfig) -> int:
    """Count the weights of a model of this architecture, tied ones once, without allocating any."""
    with FakeTensorMode():
        return weight_count(build(architecture, "bfloat16", "eager"))


def build(architecture: PreTrainedConfig, dtype: str, attention: str) -> PreTrainedModel:
    """Build the model; in a FakeTensorMode its weights have no memory. The architecture stays as it is.

    Raises UserError for what transformers does not build from it.
    """
    # the flash packages need a GPU; sdpa, like them, keeps no scores
    attention = "eager" if attention == "eager" else "sdpa"
    architecture = copy.deepcopy(architecture)  # a model writes its dtype into the one it has
    # a class of elsewhere has been loaded because the configuration allows it
    elsewhere = not type(architecture).__module__.startswith("transformers.")

    def make(attention: str) -> PreTrainedModel:
        with no_init_weights():  # some initialisers read values, and fake tensors have none
            return auto_class(architecture).from_config(
                architecture,
                dtype=getattr(torch, dtype),
                attn_implementation=attention,
                experts_implementation=IMPLEMENTATION,
                trust_remote_code=elsewhere,
            )

    try:
        model = with_attention(make, attention)
    except (ValueError, ImportError, OSError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise UserError(f"a model of type {architecture.model_type} cannot be planned: {reason}") from error
    model.tie_weights()
    return model


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """Find the decoder's layers as models.pruning.layers_of does. Raises UserError, in the words of a plan."""
    try:
        return layers_of(model)
    except UserError:
        raise UserError(f"{type(model).__name__} cannot be planned: its decoder is not one list of layers") from None


def weight_count(module: nn.Module) -> int:
    """Count the weights of a module, tied ones once."""
    return sum(map(_elements, module.parameters()))


def _elements(parameter: nn.Parameter) -> int:
    return getattr(parameter, "elements", parameter.numel())  # of a quantised one, however it is packed


def size_of(model: PreTrainedModel, kv_bytes: int, shown: PictureInputs | None = None) -> ModelSize:
    """Measure a model.

    Args:
        kv_bytes: the key-value cache of one token of one sequence, over all layers.
        shown: the pictures of a prompt; the model is one of fake tensors with known values.
    """
    counts = [weight_count(layer) for layer in decoder_layers(model)[2]]
    head = lm_head(model).weight
    tables = {
        id(module.weight): module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding)
    }
    tables.pop(id(head), None)
    return ModelSize(
        parameters=weight_count(model),
        itemsize=head.dtype.itemsize,
        stored_bytes=sum(parameter.numel() * parameter.itemsize for parameter in model.parameters()),
        head=head.numel(),
        embeddings=sum(tables.values()),
        layers=len(counts),
        largest_layer=max(counts),
        hidden_size=head.shape[1],
        kv_bytes_per_token=kv_bytes,
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        idle=idle_weights(model) + _beside_the_decoder(model),
        frozen=not all(one.requires_grad for one in _language(model).parameters()),
        **({} if shown is None else _of_pictures(model, shown)),
    )


def _of_pictures(model: PreTrainedModel, shown: PictureInputs) -> dict[str, float | bool]:
    return {
        "pictures": float(flops_of(model, shown)),
        "pictures_frozen": not any(one.requires_grad for one in weights_of(model)["vision"]),
    }


def _beside_the_decoder(model: PreTrainedModel) -> int:
    return weight_count(model) - weight_count(_language(model))


def _language(model: PreTrainedModel) -> nn.ModuleList:
    return nn.ModuleList([model.get_decoder(), model.get_output_embeddings()])
