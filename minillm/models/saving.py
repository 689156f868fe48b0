"""Hugging Face folders: safetensors, tokenizer, generation configuration, chat template."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from minillm import distributed
from minillm.atomic import write_folder
from minillm.models.preflight import end_ids
from minillm.models.sharded import is_sharded, whole_state


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of a Hugging Face folder into `folder`. All ranks call it, and rank 0 writes."""
    state = whole_state(model) if is_sharded(model) else None
    if distributed.rank():
        return
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
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The same in the place of `folder`, which never holds a part of a model."""
    write_folder(folder, lambda partial: write_model(model, tokenizer, partial))
