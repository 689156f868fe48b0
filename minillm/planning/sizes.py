"""How large a model is, from its architecture alone."""

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from minillm.models.access import lm_head
from minillm.models.families import auto_class
from minillm.models.pruning import layers_of


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


def count_parameters(architecture: PreTrainedConfig) -> int:
    """Weights of a model of this architecture, tied ones once; nothing is allocated."""
    with FakeTensorMode():
        return weight_count(auto_class(architecture).from_config(architecture))


def build(architecture: PreTrainedConfig, dtype: str, attention: str) -> PreTrainedModel:
    """The model with random weights, with no memory behind them in a FakeTensorMode. The architecture stays as it is."""
    # the flash packages need a GPU; sdpa, like them, keeps no scores
    attention = "eager" if attention == "eager" else "sdpa"
    architecture = copy.deepcopy(architecture)  # a model writes its dtype into the one it has
    return auto_class(architecture).from_config(
        architecture, dtype=getattr(torch, dtype), attn_implementation=attention
    )


def weight_count(module: nn.Module) -> int:
    """Weights of a module, tied ones once."""
    return sum(map(_elements, module.parameters()))


def _elements(parameter: nn.Parameter) -> int:
    return getattr(parameter, "elements", parameter.numel())  # of a quantised one, however it is packed


def size_of(model: PreTrainedModel, kv_bytes: int) -> ModelSize:
    """`kv_bytes`: of a token of one sequence, all layers."""
    counts = [weight_count(layer) for layer in layers_of(model)[2]]
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
    )
