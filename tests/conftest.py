"""Shared by all tests: small generated models and a tokenizer, made on the spot; real assets where they are."""

import gc
import importlib.util
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# before torch: a rank that is forked from a process with threads of OpenMP waits for them forever
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
import yaml
from hypothesis import settings

import tests.unsynced  # noqa: F401

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton, whose own functions are defined by it

# the same examples every time, however slow the machine: a failure is a defect, never the weather
settings.register_profile("repeatable", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("repeatable")


def pytest_collection_finish():
    """What the tests import stays: the garbage collector, which some runs ask for, need not pass over it each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()  # packages count at the end what they left behind


@pytest.fixture(scope="session", autouse=True)
def undrawn():
    """No run draws its picture; see `picture`."""
    if importlib.util.find_spec("pydantic") is not None:  # the losses are tested without the trainer, too
        import tests.undrawn  # noqa: F401


@pytest.fixture
def picture(monkeypatch):
    """Asked for by the tests that need curves.png."""
    from minillm.reporting import curves, report

    monkeypatch.setattr(report, "draw_run", curves.draw_run)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real data and real models; tests that need it skip where MINILLM_ASSETS does not name one."""
    folder = os.environ.get("MINILLM_ASSETS")
    if not folder or not Path(folder).is_dir():
        pytest.skip("MINILLM_ASSETS does not name a folder with the test assets")
    return Path(folder)


def tiny_llama(*, vocab_size: int = 300, hidden_size: int = 32, layers: int = 2, seed: int = 0, tie: bool = False):
    """A random Llama with logits spread enough that its distributions are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tie,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def make_models():
    """A function that makes a pair of tiny models with the byte tokenizer, as the methods and the engine see them."""
    from minillm.models.tokenizers import byte_tokenizer
    from minillm.teachers.local import LocalTeacher
    from minillm.teachers.pair import Models

    def make(*, seed: int = 0, teacher: bool = True) -> Models:
        tokenizer = byte_tokenizer()
        size, eos = len(tokenizer), tokenizer.eos_token_id
        student = tiny_llama(vocab_size=size, seed=seed)
        other = tiny_llama(vocab_size=size, hidden_size=48, seed=seed + 1).requires_grad_(False) if teacher else None
        judge = None if other is None else LocalTeacher(other)
        return Models(student, judge, tokenizer, size, (eos,), eos, torch.device("cpu"))

    return make


@pytest.fixture(scope="session")
def small_run():
    """A function that writes eight prompts and a text to a folder and returns a whole document of an sft run on them."""
    sentences = [
        "the cat sat",
        "a dog ran off",
        "we saw it",
        "birds sing",
        "no rain fell",
        "she left",
        "it is late",
        "go on",
    ]
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}

    def write(folder: Path, *, layers: int) -> dict:
        lines = [json.dumps({"prompt": f"{text}?", "completion": text}) for text in sentences]
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "corpus.txt").write_text(" ".join(sentences) * 3)
        architecture = {"model_type": "llama", "num_hidden_layers": layers, "max_position_embeddings": 64, **shape}
        prompts = {"type": "jsonl", "path": str(folder / "prompts.jsonl"), "template": "none",
                   "max_prompt_length": 16, "max_response_length": 8}  # fmt: skip
        corpus = {"type": "text", "path": str(folder / "corpus.txt"), "block_size": 8}
        return {
            "output_dir": str(folder / "run"),
            "seed": 5,
            "student": {"init": "random", "tokenizer": "byte", "config": architecture},
            "data": {"prompts": prompts, "corpus": corpus},
            "rollout": {"buffer_size": 4, "batch_size": 4, "max_new_tokens": 4},
            "train": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
            "eval": {"steps": 2, "sets": {"held_out": {**prompts, "limit": 2}}, "max_new_tokens": 4},
            "save": {"steps": 1, "keep": 2},
            "log": {"report_to": []},
            "method": {"name": "sft"},
        }

    return write


@pytest.fixture
def registered():
    """`register_method`, undone after the test."""
    from minillm.config.root import StageConfig, register_method

    field = StageConfig.model_fields["method"]
    before = field.annotation
    yield register_method
    field.annotation = before
    StageConfig.model_rebuild(force=True)


@pytest.fixture
def in_ranks(monkeypatch):
    """A function that runs work(rank) as each rank of a group, in threads that trade what processes would send."""
    from minillm.distributed import collectives

    me = threading.local()
    number = lambda: getattr(me, "rank", 0)  # noqa: E731

    def run(world_size: int, work: Callable[[int], Any]) -> list[Any]:
        barrier, sent = threading.Barrier(world_size, timeout=60), {}

        def trade(mine: Any) -> list[Any]:
            sent[number()] = mine
            barrier.wait()
            everyones = [sent[rank] for rank in range(world_size)]
            barrier.wait()
            return everyones

        def as_rank(rank: int) -> Any:
            me.rank = rank
            return work(rank)

        with monkeypatch.context() as patch:
            patch.setattr(collectives, "rank", number)
            patch.setattr(collectives, "world_size", lambda: world_size)
            patch.setattr(collectives, "gather", trade)
            patch.setattr(collectives, "gather_tensors", trade)
            patch.setattr(collectives, "exchange", lambda outgoing: [parts[number()] for parts in trade(outgoing)])
            with ThreadPoolExecutor(world_size) as pool:
                return [done.result() for done in [pool.submit(as_rank, rank) for rank in range(world_size)]]

    return run


@pytest.fixture
def one_thread():
    """A forked process has no threads of torch, and the last bits of a sum depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_stages(tmp_path, small_run) -> Path:
    """The file of a run whose first stage fine-tunes a teacher and whose second distils it by MiniLLM."""
    document = small_run(tmp_path, layers=1)
    document["stages"] = {
        "teacher": {"student": {"config": {"hidden_size": 24}}},
        "distil": {
            "teacher": {"path": "stage:teacher"},
            "method": {"name": "minillm", "ppo_epochs": 2},
            "train": {"max_steps": 6},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path
