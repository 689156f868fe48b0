"""A smaller student from a larger model: the same model with only some of its layers."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from minillm import UserError

# What configurations call their number of layers.
COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


def layer_count(config: PreTrainedConfig) -> int | None:
    """The number of layers, None where the configuration calls it something else."""
    return next((getattr(config, name) for name in COUNTS if hasattr(config, name)), None)


def layer_lists(config: PreTrainedConfig) -> dict[str, list]:
    """The configuration's lists with an entry a layer, such as layer_types."""
    return {
        key: list(value)
        for key, value in config.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == layer_count(config) and not key.endswith("token_id")
    }


def layers_of(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that holds the decoder's layers, the attribute's name, and the list.

    Raises UserError where there is no such list or more than one.
    """
    count = layer_count(model.config)
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    ]
    if len(found) != 1:
        raise UserError(
            f"student.init=prune: {type(model).__name__} has {len(found)} lists of {count} layers, so it is not clear which "
            "to prune; give a model whose decoder is one list of layers"
        )
    return found[0]


def chosen_layers(layers: int | Sequence[int], total: int) -> list[int]:
    """Which of `total` layers stay: the list itself, or as many as `layers` says, evenly spaced with first and last."""
    if isinstance(layers, int):
        if layers > total:
            raise UserError(f"student.layers is {layers}, but the model has {total} layers; give at most {total}")
        if layers == 1:
            return [0]
        return [round(index * (total - 1) / (layers - 1)) for index in range(layers)]
    if len(set(layers)) < len(layers):
        raise UserError(f"student.layers, {list(layers)}, names a layer twice; each can be kept once")
    wrong = [layer for layer in layers if layer >= total]
    if wrong:
        raise UserError(f"student.layers names {wrong}, but the model has the layers 0 to {total - 1}")
    return sorted(layers)


def prune_layers(model: PreTrainedModel, layers: int | Sequence[int]) -> PreTrainedModel:
    """Keep some layers, in place; embeddings and head stay (tied where they were), KV-cache indices are renumbered."""
    parent, name, modules = layers_of(model)
    keep = chosen_layers(layers, len(modules))
    for key, entries in layer_lists(model.config).items():
        setattr(model.config, key, [entries[index] for index in keep])
    setattr(parent, name, nn.ModuleList(modules[index] for index in keep))
    for position, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    for key in COUNTS:
        if key in model.config.to_dict():
            setattr(model.config, key, len(keep))
    return model
