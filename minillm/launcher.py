"""Which process of a run this is, as torchrun, deepspeed or Slurm say in the environment. Known before any has joined."""

import os

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def launched_size() -> int:
    """How many processes were started; 1 without a launcher."""
    return _said("WORLD_SIZE", 1)


def launched_rank() -> int:
    """This one's number among them."""
    return _said("RANK", 0)


def launched_local_rank() -> int:
    """Its number among those of its host."""
    return _said("LOCAL_RANK", 0)


def _said(name: str, otherwise: int) -> int:
    said = os.environ.get(name)
    if said is None and "SLURM_STEP_ID" in os.environ:  # without a step it is the shell of an allocation
        said = os.environ.get(_SLURM[name])
    return int(said or otherwise)
