"""The parts of a model of images and text: its vision tower, its language model with the feed-forward layers in it, and the
projector between them."""

from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel

from minillm import UserError
from minillm.config.models import Part
from minillm.models.families import decoder, sees_pictures, text_model
from minillm.models.pruning import layers_of

KEY = "student.train"
_FEED_FORWARD = ("mlp", "feed_forward", "block_sparse_moe")  # the names of these modules in a decoder's layer
_MERGER = "merger"  # in the names of the modules at the end of Qwen-VL's vision towers, which are its projector


def train_parts(
    model: PreTrainedModel, parts: Collection[Part], *, vision_from_layer: int | None = None
) -> PreTrainedModel:
    """Let the weights of some parts be trained, and freeze all others.

    Args:
        vision_from_layer: of the vision tower its layers from this one on alone, counted from 0.

    Raises UserError, which starts with the key, for a model that has no such part, or not as many layers.
    """
    weights = weights_of(model)
    if "feed_forward" in parts:
        weights["feed_forward"] = _feed_forward(model)
    missing = [part for part in parts if not weights[part]]
    if missing:
        raise UserError(f"{KEY}: {type(model).__name__} has no {' and no '.join(missing)} that minillm can tell apart")
    if "vision" in parts and vision_from_layer is not None:
        layers = _layers(_vision_tower(model))
        if vision_from_layer >= len(layers):
            raise UserError(
                f"student.vision_from_layer: the vision tower of {type(model).__name__} has the layers 0 to {len(layers) - 1}, no "
                f"{vision_from_layer}"
            )
        weights["vision"] = [one for layer in layers[vision_from_layer:] for one in layer.parameters()]
    model.requires_grad_(False)
    for part in parts:
        for weight in weights[part]:
            weight.requires_grad_(True)
    return model


def weights_of(model: PreTrainedModel) -> dict[Part, list[nn.Parameter]]:
    """The weights of each part, every weight of the model in one of them (feed_forward is inside of language); those of a text model are all of `language`.

    What is neither in the vision tower nor in the language model is of the projector.
    """
    if not sees_pictures(model):
        return {"projector": [], "language": list(model.parameters()), "vision": []}
    tower = _vision_tower(model)
    mergers = [module for name, module in tower.named_children() if _MERGER in name]
    language = _weights(text_model(model), model.get_output_embeddings())
    inside = _weights(*mergers)
    vision = {key: one for key, one in _weights(tower).items() if key not in inside}
    between = {key: one for key, one in _weights(model).items() if key not in language and key not in vision}
    return {"projector": [*between.values()], "language": [*language.values()], "vision": [*vision.values()]}


def _feed_forward(model: PreTrainedModel) -> list[nn.Parameter]:
    """The weights of the feed-forward layers of the language model; none where they have no name of their own."""
    modules = [getattr(layer, name, None) for layer in layers_of(model)[2] for name in _FEED_FORWARD]
    return [*_weights(*(one for one in modules if isinstance(one, nn.Module))).values()]


def _weights(*modules: nn.Module) -> dict[int, nn.Parameter]:
    return {id(weight): weight for module in modules for weight in module.parameters()}


def _vision_tower(model: PreTrainedModel) -> nn.Module:
    return decoder(model).get_encoder(modality="image")


def _layers(tower: nn.Module) -> nn.ModuleList:
    """The longest list of modules: the tower's layers."""
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())
