"""Devices by their makers' data sheets, and the assumptions of a plan about them."""

import os
from dataclasses import dataclass

from minillm import UserError

# Fractions of the data sheet's numbers that training and decoding reach: assumptions, shown with every estimate.
MFU = 0.40
BANDWIDTH_USE = 0.60
LINK_USE = 0.70
USABLE_MEMORY = 0.92  # the rest: the CUDA context, and what the allocator cannot use


@dataclass(frozen=True)
class Gpu:
    """One device, with dense peaks. A number is None where an estimate from it would be a guess."""

    name: str
    memory_gib: float
    bf16_tflops: float | None = None
    fp32_tflops: float | None = None
    memory_gb_per_s: float | None = None
    link_gb_per_s: float | None = None  # in one direction, to the other GPUs of a node
    kind: str = "cuda"

    @property
    def usable_bytes(self) -> int:
        """Bytes that a plan may fill."""
        return int(self.memory_gib * USABLE_MEMORY * 2**30)


def _here() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        Gpu("H100-80GB", 80, 989, 67, 3350, 450),
        Gpu("H200", 141, 989, 67, 4800, 450),
        Gpu("A100-80GB", 80, 312, 19.5, 2039, 300),
        Gpu("A100-40GB", 40, 312, 19.5, 1555, 300),
        Gpu("V100-32GB", 32, None, 15.7, 900, 150),
        Gpu("L40S", 48, 362, 91.6, 864, 32),
        Gpu("4090", 24, 165, 82.6, 1008, 32),
    )
}


def find_gpu(name: str) -> Gpu:
    """Find a device by its name in any case; `cpu` is this machine. Raises UserError, which lists the known names."""
    if name.lower() == "cpu":
        return Gpu("cpu", _here(), kind="cpu")
    if name.lower() not in GPUS:
        raise UserError(f"--gpu {name}: known are {', '.join(gpu.name for gpu in GPUS.values())} and cpu")
    return GPUS[name.lower()]
