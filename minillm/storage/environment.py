"""The versions and the machine that a run used, for env.json and the report."""

import json
import os
import platform
import time
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ENVIRONMENT = "env.json"


def describe_environment() -> dict:
    """The content of env.json. `gpu` is None where there is none; `started` is local time with its offset from UTC."""
    versions = {"python": platform.python_version(), "minillm": version("minillm")}
    for name in ("torch", "transformers", "triton", "datasets", "numpy", "peft", "deepspeed", "bitsandbytes"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "system": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def read_start(run: Path) -> datetime | None:
    """When the run of a folder began, by its env.json; None where that does not say."""
    try:
        return datetime.fromisoformat(json.loads((run / ENVIRONMENT).read_text())["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
