"""The machine and versions of a result: a number without its machine and versions is worth nothing."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch

from minillm.benchmarks.peers import PEER_PACKAGES


def describe(device: str, *, threads: int | None = None) -> dict[str, str]:
    """Names and values, in the order in which a reader wants them."""
    result = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "device": device_name(device)}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        result |= {
            "memory": f"{properties.total_memory / 2**30:.0f} GiB",
            "multiprocessors": str(properties.multi_processor_count),
            "driver": _driver(),
            "CUDA": str(torch.version.cuda),
        }
    else:
        result |= {
            "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
            "threads": str(threads or torch.get_num_threads()),
            "instruction set": torch.backends.cpu.get_cpu_capability(),
            "load at the start": ", ".join(f"{load:.2f}" for load in os.getloadavg()),
        }
    result |= {"system": platform.platform(), "Python": platform.python_version()}
    for package in ("minillm", "torch", "triton", *PEER_PACKAGES):
        result[package] = version(package)
    return result


def as_table(facts: Mapping[str, object]) -> list[str]:
    """The lines of a Markdown table of names and values."""
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]


def show_page(lines: Iterable[str], output: str | None, facts: Mapping[str, object] | None = None) -> None:
    """Print a page of these lines, and the table of facts after them; write it to `output`, whose folder is made."""
    page = "\n".join([*lines, *(() if facts is None else ("", *as_table(facts)))]) + "\n"
    print(page)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(page, encoding="utf-8")


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"
