"""Hugging Face folders: safetensors, tokenizer, generation configuration, chat template."""

import shutil
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minillm.checkpoint import sync
from minillm.models.preflight import end_ids


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the files of a Hugging Face folder into `folder`."""
    ends = list(end_ids(model, tokenizer))
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The same, so that `folder` is at any moment the old one or the new one, whole."""
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
