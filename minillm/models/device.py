"""Devices by their names."""

import torch

from minillm import UserError


def pick_device(name: str) -> torch.device:
    """The device that engine.device names. Raises UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"engine.device is {name!r}, but torch sees no GPU here; use engine.device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"engine.device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs here, from cuda:0 on"
        )
    return device
