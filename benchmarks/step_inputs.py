"""The models and prompts of `minillm bench step`, as folders that every trainer reads: random Llamas, or a real model and a
student of some of its layers."""

import argparse
import gzip
import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minillm import UserError
from minillm.benchmarks.rollout_providers import make_model


def write_random(
    student: tuple[int, int],  # hidden size, layers
    teacher: tuple[int, int],
    arguments: argparse.Namespace,
    folder: Path,
) -> None:
    """student/, teacher/ and prompts.jsonl. No answer ends early but by a rare chance."""
    words = {"</s>": 0, "<pad>": 1} | {f"w{index}": index for index in range(2, arguments.vocab)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")
    for place, (name, size) in enumerate((("student", student), ("teacher", teacher))):
        _write(make_model(*size, arguments.vocab, arguments.seed + place), tokenizer, folder / name)
    order = random.Random(arguments.seed)
    _write_prompts(
        [
            " ".join(f"w{order.randrange(2, arguments.vocab)}" for _ in range(arguments.prompt_tokens))
            for _ in range(arguments.answers * arguments.updates)
        ],
        folder,
    )


def write_real(path: str, layers: list[int], texts: str, arguments: argparse.Namespace, folder: Path) -> None:
    """student/, teacher/ and prompts.jsonl of a model's folder or GGUF file, and of a file of JSON lines whose texts are
    read one after the other. The EOS is the id that the model expects least, so that answers run to the limit."""
    from minillm.config.models import TeacherConfig
    from minillm.models.loading import load_teacher
    from minillm.models.pruning import prune_layers
    from minillm.models.tokenizers import load_tokenizer

    config = TeacherConfig(path=path)
    model = load_teacher(config, output_dir=folder, device=torch.device("cpu"))
    tokenizer = load_tokenizer(config, folder)
    prompts = _prompts(tokenizer, texts, arguments)
    ids = tokenizer(prompts[:8], return_tensors="pt", padding=True, padding_side="left").input_ids
    with torch.no_grad():
        likely = model(ids).logits.log_softmax(-1).mean((0, 1))
    likely[tokenizer.pad_token_id] = 0.0
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(likely.argmin()))
    _write(model, tokenizer, folder / "teacher")
    _write(prune_layers(model, layers), tokenizer, folder / "student")
    _write_prompts(prompts, folder)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _prompts(tokenizer: PreTrainedTokenizerBase, texts: str, arguments: argparse.Namespace) -> list[str]:
    """Prompts of at most --prompt-tokens tokens, and hardly fewer."""
    opened = gzip.open if texts.endswith(".gz") else open
    with opened(texts, "rt", encoding="utf-8") as file:
        words = [word for line in file for value in json.loads(line).values() for word in str(value).split()]
    prompts, start = [], 0
    while len(prompts) < arguments.answers * arguments.updates:
        end = start + arguments.prompt_tokens  # a word is a token or more
        if end > len(words):
            raise UserError(f"--texts {texts} has too few words for {arguments.answers * arguments.updates} prompts")
        while len(tokenizer(" ".join(words[start:end])).input_ids) > arguments.prompt_tokens:
            end -= 1
        prompts.append(" ".join(words[start:end]))
        start = end
    return prompts


def _write_prompts(prompts: list[str], folder: Path) -> None:
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as file:
        for prompt in prompts:
            file.write(json.dumps({"prompt": prompt, "completion": prompt.split()[0]}) + "\n")
