"""Where a device's name leads."""

import torch


def pick_device(name: str) -> torch.device:
    """The device that engine.device names. Raises ValueError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"engine.device is {name!r}, but torch sees no GPU here; use engine.device=cpu")
    return device
