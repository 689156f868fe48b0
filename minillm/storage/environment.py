"""The versions and the machine that a run used, for env.json and the report."""

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch


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
