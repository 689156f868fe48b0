"""Two tiny models and texts in a folder, and what training on them gives with full logits in float64."""

import importlib.util
import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.conftest import tiny_llama

EPOCHS, BATCH, ACCUMULATION, LEARNING_RATE = 3, 2, 4, 1e-2  # the eight texts are one optimiser step in every example
TEXTS = [
    "the cat sat",
    "a dog ran off",
    "we saw it",
    "birds",
    "no rain fell all day",
    "she left",
    "it is late",
    "go on",
]
ANSWERS = ["on it", "far", "once", "sing a song", "and so on", "at ten", "now", "then"]


class Setting(NamedTuple):
    """Paths, as an example takes them, and the rows that it should make of them."""

    student: str
    teacher: str
    text: str  # of lines
    pairs: str  # of JSON lines
    lines: list[tuple[Tensor, Tensor]]  # ids (L,) and labels (L,) of the same tokens
    completions: list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="session")
def setting(tmp_path_factory) -> Setting:
    from minillm.models.tokenizers import byte_tokenizer

    folder, tokenizer = tmp_path_factory.mktemp("integrations"), byte_tokenizer()
    for name, seed, hidden in (("student", 0, 32), ("teacher", 1, 48)):
        tiny_llama(vocab_size=len(tokenizer), hidden_size=hidden, seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "lines.txt").write_text("\n".join(TEXTS) + "\n")
    pairs = [{"prompt": text, "completion": answer} for text, answer in zip(TEXTS, ANSWERS, strict=True)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n")
    lines = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    completions = []
    for text, answer in zip(TEXTS, ANSWERS, strict=True):
        prompt, completion = tokenizer(text)["input_ids"], tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
        ids = torch.tensor(prompt + completion)
        completions.append((ids, ids.clone().index_fill_(0, torch.arange(len(prompt)), -100)))
    paths = (str(folder / name) for name in ("student", "teacher", "lines.txt", "pairs.jsonl"))
    return Setting(*paths, [(ids, ids) for ids in lines], completions)


@pytest.fixture(scope="session")
def eager_curve(setting) -> Callable[..., list[float]]:
    """A function that trains with full logits in float64, a row at a time: no padding, no packing, no micro-batches."""
    from transformers import AutoModelForCausalLM

    def train(value: Callable[[Tensor, Tensor, Tensor], Tensor], rows: list[tuple[Tensor, Tensor]]) -> list[float]:
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
            for path in (setting.student, setting.teacher)
        )
        optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        losses = []
        for _ in range(EPOCHS):
            total, counted = torch.zeros((), dtype=torch.float64), 0
            for ids, labels in rows:
                log_q = student(ids[None]).logits[0, :-1].log_softmax(-1)
                log_p = teacher(ids[None]).logits[0, :-1].log_softmax(-1).detach()
                kept = labels[1:] != -100
                total = total + value(log_q[kept], log_p[kept], labels[1:][kept]).sum()
                counted += int(kept.sum())
            (total / counted).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.item() / counted)
        return losses

    return train


def reverse_kl(log_q: Tensor, log_p: Tensor, labels: Tensor) -> Tensor:  # (N, V), (N, V), (N,) -> (N,)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def packed(rows: list[dict]) -> dict[str, torch.Tensor]:
    """One row of several documents, every token of which has its label: the collators of the libraries ignore the first."""
    ids = torch.cat([row["input_ids"] for row in rows])[None]
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows])[None],
    }


@pytest.fixture(scope="session")
def reverse_kl_curve(setting, eager_curve) -> list[float]:
    return eager_curve(reverse_kl, setting.lines)


@pytest.fixture(scope="session")
def example() -> Callable[[str], ModuleType]:
    """A function that gives a file of examples/ as a module."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parents[2] / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"examples_{name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def on_two_ranks(tmp_path) -> Callable[[Callable[[int], Any]], list[Any]]:
    """A function that calls work(rank) in two forked processes of one gloo group; returns what they return, as JSON has it."""

    def run(work: Callable[[int], Any]) -> list[Any]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            group = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}

        def rank(number: int) -> None:
            torch.set_num_threads(1)
            os.environ.update(group, RANK=str(number), LOCAL_RANK=str(number))
            torch.distributed.init_process_group("gloo")
            (tmp_path / f"{number}.json").write_text(json.dumps(work(number)))
            torch.distributed.destroy_process_group()

        processes = [multiprocessing.get_context("fork").Process(target=rank, args=(number,)) for number in range(2)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        return [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]

    return run
