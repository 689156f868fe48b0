"""A folder with a small configuration, and modules that are there instead of the real ones."""

import importlib
import sys
import types
from pathlib import Path

import pytest
import yaml

RECIPE = {
    "output_dir": "runs/one",
    "student": {"path": "org/big"},
    "teacher": {"path": "org/big"},
    "data": {"prompts": {"path": "train.jsonl"}},
    "method": {"name": "kd"},
    "train": {"max_steps": 10},
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    Path("train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("run.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


@pytest.fixture
def fake(monkeypatch):
    """fake("minillm.train.run", run=...): a module that is there instead of the real one."""

    def put(name: str, **attributes):
        module = types.ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        monkeypatch.setattr(importlib.import_module(parent), child, module, raising=False)

    return put


@pytest.fixture
def trained(fake):
    """The calls that `train` made."""
    calls = []

    def run(plan, *, resume, console):
        calls.append((plan, resume, console))

    fake("minillm.train.run", run=run)
    return calls
