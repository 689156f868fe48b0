"""Hugging Face folders: safetensors, tokenizer, generation configuration, chat template."""

import shutil
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from minillm.checkpoint import sync
from minillm.models.preflight import end_ids


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of a Hugging Face folder into `folder`."""
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
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The same, so that `folder` never holds a part of a model.

    A failure leaves what was there. A kill between the two renames of a replacement leaves no `folder`, and the old one
    beside it as .NAME.stale.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_model(model, tokenizer, partial)
    for path in partial.iterdir():
        sync(path)
    replace_folder(partial, folder)


def replace_folder(partial: Path, folder: Path) -> None:
    """Put `partial` in the place of `folder`."""
    stale = folder.with_name(f".{folder.name}.stale")
    shutil.rmtree(stale, ignore_errors=True)
    if folder.exists():
        folder.rename(stale)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(stale, ignore_errors=True)
