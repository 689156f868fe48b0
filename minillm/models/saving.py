"""Hugging Face folders: safetensors, tokenizer or processor, generation configuration, chat template.

Always plain whole models: adapters are merged into a copy of the weights, and lie beside in a folder of their own.
"""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from minillm import UserError
from minillm.distributed import collectives
from minillm.models.adapters import FOLDER, adapter_state, has_adapters, plain_state, write_adapter
from minillm.models.processors import processor_of
from minillm.models.sharded import gathered_state, is_sharded, name_accelerator
from minillm.models.tokenizers import end_ids
from minillm.storage.atomic import write_folder
from minillm.storage.manifest import sign
from minillm.storage.snapshot import SavedPart

MODULES = "modules"  # in a model's folder: what was trained beside it


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of a Hugging Face folder into `folder`, and adapters into its adapter/.

    All ranks call it, and rank 0 writes.
    """
    for part in (weights_part(model, tokenizer), tokenizer_part(tokenizer)):
        part.save(folder)


def weights_part(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> SavedPart:
    """All of it but the tokenizer's files."""

    def collect() -> dict[str, Any]:
        state = gathered_state(model) if is_sharded(model) else model.state_dict()
        if collectives.rank():
            return {}
        adapters = adapter_state(state) if has_adapters(model) else {}
        if adapters:
            state = plain_state(model, state, merged=True)
        return {**_settings(model, tokenizer), "weights": state, "adapters": adapters}

    def write(collected: dict[str, Any], folder: Path) -> None:
        if collectives.rank():
            return
        if collected["adapters"]:
            write_adapter(model, collected["adapters"], folder / FOLDER)
        _write(model, collected, folder)

    return SavedPart(collect, write, fresh=is_sharded(model))


def tokenizer_part(tokenizer: PreTrainedTokenizerBase) -> SavedPart:
    """The files of a tokenizer or a processor, by their names in its folder. Rank 0 writes."""

    def collect() -> dict[str, bytes]:
        if collectives.rank():
            return {}
        with tempfile.TemporaryDirectory() as folder:
            (processor_of(tokenizer) or tokenizer).save_pretrained(folder)
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {str(path.relative_to(folder)): path.read_bytes() for path in files}

    def write(files: dict[str, bytes], folder: Path) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    return SavedPart(collect, write)


def write_frozen(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The same of the frozen weights below the adapters of a model that is not sharded."""
    if collectives.rank() == 0:
        state = plain_state(model, model.state_dict(), merged=False)
        _write(model, {**_settings(model, tokenizer), "weights": state}, folder)
    tokenizer_part(tokenizer).save(folder)


def _settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The model's configurations, of which that of generation knows every end of an answer."""
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
    return {"config": model.config, "generation_config": model.generation_config}


def _write(model: PreTrainedModel, collected: Mapping[str, Any], folder: Path) -> None:
    name_accelerator()
    # of the model itself, which may be at work meanwhile, nothing is changed or saved
    saved = _whole(model, collected) if is_sharded(model) else copy.copy(model)
    saved.config, saved.generation_config = collected["config"], collected["generation_config"]
    saved.save_pretrained(folder, state_dict=collected["weights"])


def _whole(model: PreTrainedModel, collected: Mapping[str, Any]) -> PreTrainedModel:
    """A model of the collected weights, for what transformers asks of one while it writes.

    Of one in pieces it would ask the pieces: experts, whose file has another order of dimensions than the module, would be
    turned round by shapes that are not theirs, and DeepSpeed would gather a weight that a thread asks for beside a step.
    """
    with torch.device("meta"):
        whole = type(model)(copy.deepcopy(collected["config"]))
    whole.load_state_dict(collected["weights"], strict=False, assign=True)
    if hasattr(model, "_weight_conversions"):
        whole._weight_conversions = model._weight_conversions
    return whole


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The same in the place of `folder`, which never holds a part of a model, with a manifest of its checksums."""
    write_folder(folder, lambda partial: write_model(model, tokenizer, partial), sign=sign)


def write_modules(modules: Mapping[str, nn.Module], folder: Path) -> None:
    """Write what is trained beside the student into the folder's modules/, a safetensors file each.

    Frozen weights are left out. A model with adapters has them in peft's format too, in NAME_adapter/. All ranks call it, and rank 0 writes.
    """
    for name, module in modules.items():
        module_part(name, module).save(folder)


def module_part(name: str, module: nn.Module) -> SavedPart:
    """One of these modules."""

    def collect() -> dict[str, dict[str, Tensor]]:
        state = gathered_state(module) if is_sharded(module) else module.state_dict()
        if collectives.rank():
            return {}
        trained = {key: state[key].detach() for key in _kept_names(module)}
        return {"trained": trained, "adapters": adapter_state(state) if has_adapters(module) else {}}

    def write(collected: dict[str, dict[str, Tensor]], folder: Path) -> None:
        if collectives.rank():
            return
        trained = {key: one.cpu().contiguous() for key, one in collected["trained"].items()}
        (folder / MODULES).mkdir(exist_ok=True)
        save_file(trained, folder / MODULES / f"{name}.safetensors", metadata={"format": "pt"})
        if collected["adapters"]:
            write_adapter(module, collected["adapters"], folder / f"{name}_{FOLDER}")

    return SavedPart(collect, write, fresh=is_sharded(module))


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
