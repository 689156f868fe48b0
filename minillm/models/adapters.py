"""LoRA adapters of a student: put in, taken out of its state, written in peft's format and read back.

peft puts them into the model in place, so that everything else sees the model's own class, and its LM head untouched.
"""

import copy
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PreTrainedModel

from minillm import UserError
from minillm.config.lora import LoraConfig
from minillm.models.adapter_targets import LINEAR, target_names

FOLDER = "adapter"  # inside the folder of the merged model
_NAME, _FILE, _PREFIX = "default", "adapter_model.safetensors", "base_model.model."


def add_adapters(
    model: PreTrainedModel,
    config: LoraConfig,
    *,
    seed: int,
    base: str | None = None,
    revision: str | None = None,
    key: str = "student.lora",
) -> PreTrainedModel:
    """Freeze the model and give it adapters to train, in place: at first they change nothing.

    What A begins as depends on `seed` alone. Adapters are float32 over weights of any dtype. `base` and
    `revision` are where the adapter's own configuration says that others find these weights; `key` is the configuration's,
    for errors.

    Raises UserError as target_names does.
    """
    import peft

    names = target_names(model, config.target_modules, key=f"{key}.target_modules")
    if not names:
        raise UserError(f"{key}: {type(model).__name__} has no linear layers that adapters could go on")
    modules = dict(model.named_modules())
    settings = peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=0.0,
        target_modules=names,
        fan_in_fan_out=not any(isinstance(modules[name], nn.Linear) for name in names),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        revision=revision,
    )
    # peft's own values have the dtype of the weights below; and what it does with them no fake tensor of a plan can
    with unset_fake_temporarily():
        peft.inject_adapter_in_model(settings, model, adapter_name=_NAME, low_cpu_mem_usage=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed}/adapters".encode()))  # not the stream that fresh weights came from
        for layer in _adapted(model).values():
            for part in (layer.lora_A, layer.lora_B):
                part[_NAME].weight = nn.Parameter(torch.empty(part[_NAME].weight.shape))
            layer.reset_lora_parameters(_NAME, init_lora_weights=True)
            for part in (layer.lora_A, layer.lora_B):
                part[_NAME].weight.data = part[_NAME].weight.data.to(layer.base_layer.weight.device)
    return model


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was before its adapters, to the last bit, while the context is open.

    Their product is scaled by 0 and not left out: under ZeRO-3 every forward pass must gather the same weights.
    """
    layers = list(_adapted(model).values())
    scales = [layer.scaling[_NAME] for layer in layers]
    try:
        for layer in layers:
            layer.scaling[_NAME] = 0.0
        yield
    finally:
        for layer, scale in zip(layers, scales, strict=True):
            layer.scaling[_NAME] = scale


def has_adapters(model: nn.Module) -> bool:
    """True where add_adapters was called on it."""
    return _NAME in getattr(model, "peft_config", {})


@torch.no_grad()
def plain_state(model: PreTrainedModel, state: Mapping[str, Tensor], *, merged: bool) -> dict[str, Tensor]:
    """A state dict of the model with adapters, as one of the model without: W + (alpha / r) B A, or W alone.

    The sum is taken in float32 and rounded once, to the dtype of W. Tensors without an adapter are those of `state`.
    """
    plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if not _is_adapter(name)}
    for name, layer in _adapted(model).items() if merged else ():
        down, up = (state[f"{name}.{part}.{_NAME}.weight"].float() for part in ("lora_A", "lora_B"))
        change = layer.scaling[_NAME] * (up @ down)
        weight = plain[f"{name}.weight"]
        change = change if isinstance(layer.base_layer, nn.Linear) else change.T
        plain[f"{name}.weight"] = (weight.float() + change).to(weight.dtype)
    return plain


def adapter_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters' part of a state dict."""
    return {name: tensor for name, tensor in state.items() if _is_adapter(name)}


def write_adapter(model: PreTrainedModel, adapters: Mapping[str, Tensor], folder: Path) -> None:
    """An `adapter_state` of the model in peft's format, each tensor in its own dtype: what PeftModel.from_pretrained loads."""
    folder.mkdir()
    settings = copy.copy(model.peft_config[_NAME])
    settings.inference_mode = True
    settings.target_modules = sorted(settings.target_modules)  # a set, whose order differs from process to process
    settings.save_pretrained(folder)
    tensors = {_in_file(name): tensor.contiguous() for name, tensor in adapters.items()}
    save_file(tensors, folder / _FILE, metadata={"format": "pt"})


@torch.no_grad()
def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Give the model's adapters the very values that write_adapter wrote.

    Raises UserError where they are adapters of other modules or of another rank.
    """
    saved = load_file(folder / _FILE)
    adapters = {_in_file(name): parameter for name, parameter in model.named_parameters() if _is_adapter(name)}
    shapes = [{name: tuple(tensor.shape) for name, tensor in one.items()} for one in (saved, adapters)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{folder} holds adapters of other modules or of another rank than student.lora says")
    for name, parameter in adapters.items():
        parameter.copy_(saved[name])


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(_base(module), LINEAR)}


def _base(module: nn.Module) -> nn.Module | None:
    return getattr(module, "base_layer", None)


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _in_file(name: str) -> str:
    return _PREFIX + name.replace(f".{_NAME}.", ".")
