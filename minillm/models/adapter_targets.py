"""The modules that `student.lora.target_modules` names, found in the model itself, before anything is trained."""

import difflib

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minillm import UserError
from minillm.config.lora import HEAD_REFUSED, TABLE_REFUSED
from minillm.models.families import text_model

KEY = "student.lora.target_modules"
LINEAR = (nn.Linear, Conv1D)  # GPT-2's Conv1D is a linear layer whose weight lies the other way
FORWARDS = tuple(kind.forward for kind in LINEAR)


def target_names(model: PreTrainedModel, asked: str | list[str], *, key: str = KEY) -> list[str]:
    """The full names of the modules that get an adapter, in the model's order.

    Args:
        model: without adapters.
        asked: "all-linear" for every linear layer below the LM head, or ends of names: `q_proj`, `mlp.c_proj`. Of a
            model of images and text they are those of its language model.

    Raises UserError, which starts with the key, for a name that is none of the model's, that is of no linear layer, or
    that is of the LM head or of embeddings.
    """
    below = {id(module) for module in text_model(model).modules()}
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    linear = [
        name
        for name, module in modules.items()
        if isinstance(module, LINEAR) and id(module) in below and module is not head and _is_plain(module)
    ]
    if asked == "all-linear":
        return linear
    chosen = set()
    for ending in asked:
        found = {name: module for name, module in modules.items() if f".{name}".endswith(f".{ending}")}
        if any(module is head for module in found.values()):
            raise UserError(f"{key}: {HEAD_REFUSED.format(ending)}")
        if any(isinstance(module, nn.Embedding) for module in found.values()):
            raise UserError(f"{key}: {TABLE_REFUSED.format(ending)}")
        if not found:
            raise UserError(f"{key}: {type(model).__name__} has no module {ending}; {_nearest(ending, linear)}")
        found = {name: module for name, module in found.items() if id(module) in below}
        if not found:
            raise UserError(
                f"{key}: {ending} is outside of the language model of {type(model).__name__}, and adapters go into that "
                f"alone; {_nearest(ending, linear)}"
            )
        wrong = sorted(found.keys() - set(linear))
        if wrong:
            inside = [name for name in linear if name.startswith(f"{wrong[0]}.")]
            hint = f"linear layers in it are {_endings(inside)}" if inside else _nearest(ending, linear)
            raise UserError(f"{key}: {wrong[0]} is a {type(modules[wrong[0]]).__name__}, not a linear layer; {hint}")
        chosen |= found.keys()
    return [name for name in linear if name in chosen]


def _is_plain(module: nn.Module) -> bool:
    """True for a linear layer that gives `(1, outputs)` for `(1, inputs)`, to which an adapter's product can be added.

    Routers (Llama 4, PhiMoE) and grouped products (DeepSeek-V4) are classes of architectures that extend nn.Linear.
    """
    own = type(module).__module__.startswith("transformers") and type(module).forward not in FORWARDS
    if not own:  # those of quantised weights among them
        return True
    weights = {name: torch.empty_like(one, device="meta") for name, one in module.named_parameters()}
    row = torch.empty(1, module.in_features, dtype=module.weight.dtype, device="meta")
    try:
        result = functional_call(module, weights, (row,))
    except Exception:  # whatever a row is to it, it is not the input of a linear layer
        return False
    return isinstance(result, torch.Tensor) and result.shape == (1, module.out_features)


def _endings(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _nearest(ending: str, linear: list[str]) -> str:
    endings = dict.fromkeys(name.rpartition(".")[2] for name in linear)
    close = difflib.get_close_matches(ending.rpartition(".")[2], endings, 3, 0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"its linear layers are {', '.join(endings)}"
