"""Hugging Face folders: safetensors, tokenizer, generation configuration, chat template.

Always plain whole models: adapters are merged into a copy of the weights, and lie beside in a folder of their own.
"""

from pathlib import Path

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from minillm.distributed import collectives
from minillm.models.adapters import FOLDER, has_adapters, plain_state, write_adapter
from minillm.models.preflight import end_ids
from minillm.models.sharded import gathered_state, is_sharded, name_accelerator
from minillm.storage.atomic import write_folder
from minillm.storage.manifest import sign


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
    tokenizer.save_pretrained(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The same in the place of `folder`, which never holds a part of a model, with a manifest of its checksums."""
    write_folder(folder, lambda partial: write_model(model, tokenizer, partial), sign=sign)
