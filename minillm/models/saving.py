"""Hugging Face folders: safetensors, tokenizer or processor, generation configuration, chat template.

Always plain whole models: adapters are merged into a copy of the weights, and lie beside in a folder of their own.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from minillm import UserError
from minillm.distributed import collectives
from minillm.models.adapters import FOLDER, has_adapters, plain_state, write_adapter
from minillm.models.processors import processor_of
from minillm.models.sharded import gathered_state, is_sharded, name_accelerator
from minillm.models.tokenizers import end_ids
from minillm.storage.atomic import write_folder
from minillm.storage.manifest import sign

MODULES = "modules"  # in a model's folder: what was trained beside it


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of a Hugging Face folder into `folder`, and adapters into its adapter/.

    All ranks call it, and rank 0 writes.
    """
    state = gathered_state(model) if is_sharded(model) else None
    if collectives.rank():
        return
    if has_adapters(model):
        state = model.state_dict() if state is None else state
        write_adapter(model, state, folder / FOLDER)
        state = plain_state(model, state, merged=True)
    _write(model, tokenizer, folder, state)


def write_frozen(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The same of the frozen weights below the adapters of a model that is not sharded."""
    if collectives.rank() == 0:
        _write(model, tokenizer, folder, plain_state(model, model.state_dict(), merged=False))


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, state: dict[str, Tensor] | None
) -> None:
    ends = list(end_ids(model, tokenizer))
    ids = {
        "eos_token_id": ends if len(ends) > 1 else ends[0],
        "pad_token_id": ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }
    model.generation_config.update(**ids)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # published models carry settings that transformers reads and refuses to write
        model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, **ids)
    name_accelerator()
    model.save_pretrained(folder, state_dict=state)
    (processor_of(tokenizer) or tokenizer).save_pretrained(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The same in the place of `folder`, which never holds a part of a model, with a manifest of its checksums."""
    write_folder(folder, lambda partial: write_model(model, tokenizer, partial), sign=sign)


def write_modules(modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Write what is trained beside the student into the folder's modules/, a safetensors file each.

    Frozen weights are left out. A model with adapters has them in peft's format too, in NAME_adapter/. All ranks call it, and rank 0 writes.
    """
    for name, module in modules.items():
        state = gathered_state(module) if is_sharded(module) else module.state_dict()
        if collectives.rank() == 0:
            trained = {key: state[key].detach().cpu().contiguous() for key in _kept_names(module)}
            (folder / MODULES).mkdir(exist_ok=True)
            save_file(trained, folder / MODULES / f"{name}.safetensors", metadata={"format": "pt"})
            if has_adapters(module):
                write_adapter(module, state, folder / f"{name}_{FOLDER}")


@torch.no_grad()
def read_modules(modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Give modules the weights that write_modules wrote; a sharded one has them from its engine's state already.

    Raises UserError where the file is not there, or holds weights of another module.
    """
    for name, module in modules.items():
        if is_sharded(module):
            continue
        path = folder / MODULES / f"{name}.safetensors"
        if not path.is_file():
            raise UserError(f"{path} is missing: {name} was trained beside the student, and is part of the checkpoint")
        saved, own = load_file(path), module.state_dict()
        shapes = [
            {key: tuple(one[key].shape) for key in keys} for one, keys in ((saved, saved), (own, _kept_names(module)))
        ]
        if shapes[0] != shapes[1]:
            raise UserError(f"{path} holds weights of another {name} than this configuration makes")
        for key, tensor in saved.items():
            own[key].copy_(tensor)


def _kept_names(module: nn.Module) -> list[str]:
    """The names of a module's state that training changes: all but frozen weights."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    if isinstance(module, PreTrainedModel):  # its buffers are made by its configuration
        frozen |= {name for name, _ in module.named_buffers()}
    return [name for name in module.state_dict() if name not in frozen]
