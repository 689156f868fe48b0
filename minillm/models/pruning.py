"""A smaller student from a larger model: the same model with only some of its layers, and a configuration that says so.

What a configuration says of its layers comes in a few kinds: how many there are, lists with an entry a layer, indices of
layers, counts from the front, counts from the back, and tables as wide as all layers together. These are rewritten; a
model that the rewritten configuration does not rebuild is refused.
"""

import copy
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from minillm import UserError
from minillm.models.families import decoder, text_config, text_model

# Keys whose list holds indices of layers, whatever its length.
INDICES = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers")
# Layers before the first that is different; a layer's index is such a count too.
FROM_THE_FRONT = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
# Layers at the end that are different.
FROM_THE_BACK = ("num_kv_shared_layers",)
# The last layer that is different, itself included.
LAST = ("moe_layer_end_index",)
# Lists that have nothing to do with layers, however long they are.
OTHER_LISTS = ("time_step_limit", "architectures")
# Modules outside of the layers with a block for each, one after the other: the dimension of the weight.
TABLES = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}
# Attributes of modules that are indices of layers.
INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "kv_shared_layer_index")


def layer_count(config: PreTrainedConfig) -> int | None:
    """The number of layers of the language model, None where the configuration does not say it."""
    return getattr(text_config(config), "num_hidden_layers", None)


def layer_lists(config: PreTrainedConfig) -> dict[str, list]:
    """The configuration's lists with an entry a layer, such as layer_types."""
    of_text, count = text_config(config), layer_count(config)
    return {
        key: list(value)
        for key, value in of_text.to_dict().items()
        if isinstance(value, (list, tuple))
        and len(value) == count
        and not key.endswith("token_id")
        and key not in (*INDICES, *OTHER_LISTS)
    }


def layers_of(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module that holds the decoder's layers, the attribute's name, and the list.

    Raises UserError where there is no such list or more than one.
    """
    count = layer_count(model.config)
    found = [
        (parent, name, child)
        for parent in text_model(model).modules()
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
    """The layers of `total` that stay: the list itself, or as many as `layers` says, evenly spaced with first and last."""
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


def pruned_architecture(architecture: PreTrainedConfig, layers: int | Sequence[int]) -> PreTrainedConfig:
    """The configuration of the model with only some of its layers; the one given stays as it is."""
    pruned = copy.deepcopy(architecture)
    _rewrite(pruned, chosen_layers(layers, layer_count(architecture)))
    return pruned


def prune_layers(model: PreTrainedModel, layers: int | Sequence[int], *, hollow: bool = False) -> PreTrainedModel:
    """Keep some layers, in place; embeddings and head stay (tied where they were), indices of layers are renumbered.

    `hollow`: the weights hold nothing yet, so that what the model computes cannot be looked at.
    Raises UserError for a model that the configuration would not rebuild as it is then.
    """
    parent, name, modules = layers_of(model)
    keep = chosen_layers(layers, len(modules))
    for table, dimension in TABLES.items():
        for module in text_model(model).modules():
            if hasattr(module, table):
                _keep_blocks(getattr(module, table), dimension, keep, len(modules))
    _rewrite(model.config, keep)
    setattr(parent, name, nn.ModuleList(modules[index] for index in keep))
    place = {old: new for new, old in enumerate(keep)}
    for module in getattr(parent, name).modules():  # each once, though layers may share it
        for attribute in INDEX_ATTRIBUTES:
            old = getattr(module, attribute, None)
            if isinstance(old, int) and 0 <= old < len(modules):
                if old not in place:
                    raise UserError(
                        f"student.layers: a {type(module).__name__} of a layer that stays reads what layer {old} has "
                        f"computed ({attribute}); keep that one too"
                    )
                setattr(module, attribute, place[old])
    require_described(model, getattr(parent, name), hollow=hollow)
    return model


@torch.no_grad()
def require_described(model: PreTrainedModel, layers: nn.ModuleList, *, hollow: bool = False) -> None:
    """Raises UserError where the model's configuration, written to a file and read again, makes another model: other
    weights or shapes, layers that were told something else when they were made, or that compute something else.

    What modules outside of the layers know of them all they are told anew.
    """
    told = f"student.layers: {type(model).__name__} with these layers is not what its configuration makes"
    advice = "keep layers whose kinds alternate as they did, or choose another model"
    try:
        again = _made_again(model)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise UserError(f"{told}, which is refused ({error}); {advice}") from error
    shapes, expected = ({name: tuple(one.shape) for name, one in each.state_dict().items()} for each in (model, again))
    different = [name for name in [*expected, *shapes] if expected.get(name) != shapes.get(name)]
    inside = {id(module) for module in layers.modules()}
    for (name, ours), (_, theirs) in zip(model.named_modules(), again.named_modules(), strict=False):
        for attribute, value in _attributes(theirs).items():
            if _attributes(ours).get(attribute, value) == value:
                continue
            if id(ours) in inside:
                different.append(f"{name}.{attribute}")
            else:
                setattr(ours, attribute, value)
    if different:
        raise UserError(f"{told}: {different[0]} differs, so that it could not be loaded again; {advice}")
    if not hollow:
        _require_same_hidden(model, again, f"{told}: they compute different things; {advice}")


def _made_again(model: PreTrainedModel) -> PreTrainedModel:
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        config = type(model.config).from_pretrained(folder)
    with no_init_weights():  # memory that is never written takes no room, and buffers are computed
        return type(model)._from_config(config, dtype=model.dtype, attn_implementation="eager")


def _require_same_hidden(model: PreTrainedModel, again: PreTrainedModel, message: str) -> None:
    again.load_state_dict(model.state_dict(), assign=True)
    again.train(model.training)
    hidden = last_hidden_of_both(model, again, message)
    if not torch.allclose(*hidden, rtol=1e-3, atol=1e-5, equal_nan=True):
        raise UserError(message)


def last_hidden_of_both(
    model: PreTrainedModel, other: PreTrainedModel, message: str
) -> tuple[Tensor, Tensor]:  # (1, 8, H) each
    """The last hidden states of two models over the same few ids. Raises UserError, with `message`, where one cannot run."""
    ids = torch.arange(1, 9)[None] % text_config(model.config).vocab_size
    before = model.config._attn_implementation, other.config._attn_implementation
    for one in (model, other):
        one.set_attn_implementation("eager")  # which runs everywhere
    try:
        with torch.no_grad():
            first, second = (
                decoder(one)(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
                for one in (model, other)
            )
    except (KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{message} ({type(error).__name__}: {error})") from error
    finally:
        for one, attention in zip((model, other), before, strict=True):
            one.set_attn_implementation(attention)
    return first, second


def _rewrite(config: PreTrainedConfig, keep: Sequence[int]) -> None:
    config, total = text_config(config), layer_count(config)
    place = {old: new for new, old in enumerate(keep)}
    keys = config.to_dict()
    changed: dict[str, Any] = {key: [entries[index] for index in keep] for key, entries in layer_lists(config).items()}
    for key in keys:
        value = keys[key]
        if key in INDICES and isinstance(value, (list, tuple)):
            changed[key] = [place[index] for index in value if index in place]
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if key in FROM_THE_FRONT:
            changed[key] = sum(index < value for index in keep)
        elif key in FROM_THE_BACK:
            changed[key] = sum(index >= total - value for index in keep)
        elif key in LAST and value >= 0:
            changed[key] = sum(index <= value for index in keep) - 1
    of_layers = keys.get("per_layer_config")  # what is different in some, by index
    if of_layers:
        config.per_layer_config = None  # it is checked against the number of layers
    if isinstance(keys.get("attention_types"), list):  # GPT-Neo: its kinds with how often they come
        changed["attention_types"] = [[[config.attention_layers[index]], 1] for index in keep]
    for key, value in changed.items():
        setattr(config, key, value)
    if layer_count(config) != len(keep):  # some configurations count an entry of a list
        try:
            config.num_hidden_layers = len(keep)
        except NotImplementedError as error:
            raise UserError(
                f"student.init=prune: the configuration of {config.model_type} takes no number of layers ({error}); choose "
                "another model"
            ) from error
    if of_layers:
        config.per_layer_config = {
            place[int(index)]: different for index, different in of_layers.items() if int(index) in place
        }


@torch.no_grad()
def _keep_blocks(module: nn.Module, dimension: int, keep: Sequence[int], total: int) -> None:
    weight = module.weight
    blocks = weight.unflatten(dimension, (total, -1))
    kept = blocks.index_select(dimension, torch.tensor(keep, device=weight.device)).flatten(dimension, dimension + 1)
    module.weight = nn.Parameter(kept, requires_grad=weight.requires_grad)
    for name in ("embedding_dim", "out_features"):
        if hasattr(module, name):
            setattr(module, name, kept.shape[dimension])


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The settings that a module was made with, as far as they can be compared."""
    plain = (bool, int, float, str)
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and name not in ("training", "name_or_path") and not name.startswith("_")
    }
