"""A small valid experiment in a folder of its own: byte models made on the spot, three arms from a shared start."""

import json
from pathlib import Path

import pytest
import yaml

from minillm.experiment.experiment_file import load_experiment
from tests.experiment.made_up_results import Folders

LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
PROMPTS = {"path": "prompts.jsonl", "template": "none", "max_prompt_length": 16, "max_response_length": 8}
START = {"student": {"path": "stage:warmup", "init": "pretrained", "config": None}}


@pytest.fixture
def document() -> dict:
    return {
        "title": "Three arms",
        "output_dir": "out",
        "seeds": [1, 2],
        "base": {
            "student": {"init": "random", "tokenizer": "byte", "config": LLAMA},
            "data": {"prompts": PROMPTS},
            "rollout": {"buffer_size": 4, "batch_size": 4, "max_new_tokens": 4},
            "method": {"name": "sft"},
            "train": {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2},
            "save": {"steps": 1},
            "log": {"report_to": []},
        },
        "shared": {"warmup": {}},
        "arms": {
            "start": "stage:warmup",
            "sft": {**START, "train": {"max_student_tokens": 20, "max_steps": None}},
            "kd": {**START, "teacher": {"path": "stage:warmup"}, "method": {"name": "kd"}},
            "timed": {**START, "train": {"max_seconds": "stage:sft"}},
        },
        "evaluation": {"sets": {"held_out": {**PROMPTS, "limit": 2}}, "max_new_tokens": 4, "distinct": [2]},
        "measures": ["loss_nats", "rouge_l", "distinct_2@held_out", "student_tokens"],
        "claims": [
            {"says": "Training helps", "arm": "sft", "measure": "loss_nats", "relation": "below", "than": "start"}
        ],
    }


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The current folder, with the prompts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    sentences = ["the cat sat", "a dog ran off", "we saw it", "birds sing", "no rain fell", "she left"]
    records = [{"prompt": f"{text}?", "completion": text} for text in sentences]
    Path("prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


@pytest.fixture
def write(folder, document):
    """write(**changes) -> the path of the experiment's file; a change is `group__key=value`, `...` takes a key out."""

    def to_file(name: str = "three.yaml", **changes) -> str:
        for keys, value in changes.items():
            *above, key = keys.split("__")
            group = document
            for part in above:
                group = group.setdefault(part, {})
            if value is ...:
                del group[key]
            else:
                group[key] = value
        Path(name).write_text(yaml.safe_dump(document, sort_keys=False))
        return name

    return to_file


@pytest.fixture
def folders(write) -> Folders:
    """What the runs of the experiment would leave in out/."""
    return Folders(load_experiment(write()), Path("out"))
