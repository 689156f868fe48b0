"""env.json names the versions that are installed, and is JSON."""

import importlib.metadata
import json
from datetime import datetime

import torch

from minillm.storage import environment
from minillm.storage.environment import describe_environment


def test_the_versions_are_those_that_are_installed(monkeypatch):
    def version(name: str) -> str:
        if name == "deepspeed":
            raise importlib.metadata.PackageNotFoundError(name)
        return importlib.metadata.version(name)

    monkeypatch.setattr(environment, "version", version)
    found = describe_environment()
    assert json.loads(json.dumps(found)) == found
    assert found["versions"]["torch"] == torch.__version__ and found["versions"]["minillm"]
    assert "deepspeed" not in found["versions"]
    assert datetime.strptime(found["started"], "%Y-%m-%dT%H:%M:%S%z").tzinfo is not None
    assert (found["gpu"] is None) == (not torch.cuda.is_available())
