"""Devices by their names, and tensors on their way from one to another."""

import torch
from torch import Tensor

from minillm import UserError

ENGINE_KEY = "engine.device"


def pick_device(name: str, key: str = ENGINE_KEY) -> torch.device:
    """The device that a key of the configuration names, or an option of the command line. Raises UserError, which names
    either, where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"{key} is {name!r}; it must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        remedy = f"{key} cpu" if key.startswith("--") else f"{key}=cpu"
        raise UserError(f"{key} is {name!r}, but torch sees no GPU here; use {remedy}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{key} is {name!r}, but torch sees {torch.cuda.device_count()} GPUs here, from cuda:0 on")
    return device


def same_device(one: torch.device, other: torch.device) -> bool:
    """True for two names of one device: `cuda` is `cuda:0`, since ranks that have other GPUs number them."""
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device. The host does not wait for a copy to a GPU; from a GPU it must, or it would read what has not
    come yet."""
    return tensor.to(device, non_blocking=torch.device(device).type != "cpu")
