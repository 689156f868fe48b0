"""Two ranks of DeepSpeed against one process: the same recipe, the same steps, for every method and stage of ZeRO."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

SENTENCES = ["the cat sat", "a dog ran off", "we saw it", "birds sing", "no rain fell", "she left", "it is late", "go"]
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
TWO = ("engine.type=deepspeed", "train.gradient_accumulation_steps=1")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    lines = [json.dumps({"prompt": f"{text}?", "completion": text}) for text in SENTENCES]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "corpus.txt").write_text(" ".join(SENTENCES) * 3)
    prompts = {"type": "jsonl", "path": str(folder / "prompts.jsonl"), "template": "none",
               "max_prompt_length": 16, "max_response_length": 8}  # fmt: skip
    taught = {"teacher": {"path": "stage:teacher"}}
    document = {
        "output_dir": str(folder / "run"),
        "seed": 5,
        "student": {"init": "random", "tokenizer": "byte", "config": LLAMA},
        "data": {"prompts": prompts, "corpus": {"type": "text", "path": str(folder / "corpus.txt"), "block_size": 8}},
        "rollout": {"buffer_size": 8, "batch_size": 4, "max_new_tokens": 4},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
                  "learning_rate": 1e-3},
        "eval": {"steps": 2, "sets": {"held_out": {**prompts, "limit": 3}}, "max_new_tokens": 4},
        "save": {"steps": 1, "keep": 2},
        "log": {"report_to": []},
        "method": {"name": "sft"},
        "stages": {
            "teacher": {"student": {"config": {"hidden_size": 24}}},
            "kd": {**taught, "method": {"name": "kd"}},
            "gkd": {**taught, "method": {"name": "gkd"}},
            "seqkd": {**taught, "method": {"name": "seqkd"}},
            "distil": {**taught, "method": {"name": "minillm", "ppo_epochs": 2}, "train": {"max_steps": 4}},
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def start(ranks: int, *arguments: str) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "minillm", "train", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output[-3000:]
    return output


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(recipe) -> dict[str, Path]:
    folders = {name: recipe.parent / name for name in ("one", "two")}
    finish(start(1, str(recipe), f"output_dir={folders['one']}"))
    finish(start(2, str(recipe), f"output_dir={folders['two']}", *TWO))
    return folders


def test_two_ranks_take_the_steps_of_one_process(unbroken):
    ours, theirs = records(unbroken["two"]), records(unbroken["one"])
    assert len(ours) == len(theirs) and {record["stage"] for record in ours} >= {"teacher", "kd", "gkd", "distil"}
    for mine, other in zip(ours, theirs, strict=True):
        where = mine["stage"], mine["kind"], mine["stage_step"]
        assert (mine["kind"], mine["stage"], mine["student_tokens"]) == (
            other["kind"], other["stage"], other["student_tokens"])  # fmt: skip
        if mine["kind"] == "eval":
            assert mine["mean"] == pytest.approx(other["mean"], rel=1e-4, abs=1e-5), where
            continue
        for name in ("loss", "grad_norm", "learning_rate"):
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), (where, name)


def test_the_final_models_are_whole_and_alike(unbroken):
    ours, theirs = (load_file(unbroken[name] / "final" / "model.safetensors") for name in ("two", "one"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_a_killed_rank_is_named_and_the_run_goes_on(unbroken, recipe):
    folder = recipe.parent / "killed"
    arguments = (str(recipe), f"output_dir={folder}", *TWO)
    process = start(2, *arguments)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoint-*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victim = next(pid for pid in children if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(victim), signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60 and process.returncode
    assert "rank 1" in output or "rank: 1" in output or "local_rank: 1" in output, output[-3000:]
    finish(start(2, *arguments, "--resume"))
    ours, theirs = (load_file(path / "final" / "model.safetensors") for path in (folder, unbroken["two"]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
