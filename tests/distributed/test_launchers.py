"""Runs under the launchers of docs/cluster.md other than torchrun (test_two_hosts.py): their processes are one run."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

KEYS = ("engine.type=deepspeed", "engine.stage=2")


@pytest.fixture
def recipe(tmp_path, small_run) -> Path:
    document = small_run(tmp_path, layers=1)
    document["eval"] = {"sets": {}}
    document["save"]["steps"] = None
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.fixture
def port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def check(recipe: Path) -> None:
    """Two ranks took both steps, of two prompts each."""
    (checkpoint,) = (recipe.parent / "run").glob("checkpoint-2")
    assert json.loads((checkpoint / "state" / "trainer.json").read_text())["world_size"] == 2
    assert {path.name for path in (checkpoint / "state").glob("*.pt")} == {"engine-0-of-2.pt", "engine-1-of-2.pt"}


def test_deepspeed(recipe, port):
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus=2", f"--master_port={port}", "--module"]
    result = subprocess.run(
        [*command, "minillm", "train", str(recipe), *KEYS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    check(recipe)


def test_two_tasks_of_slurm(recipe, port):
    """`srun` starts the command once per task and numbers the tasks; the user sets MASTER_ADDR."""
    step = {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "minillm", "train", str(recipe), *KEYS],
            env={**os.environ, "OMP_NUM_THREADS": "1", **step, "SLURM_PROCID": task, "SLURM_LOCALID": task},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in "01"
    ]
    outputs = [task.communicate(timeout=300)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], [output[-3000:] for output in outputs]
    check(recipe)
