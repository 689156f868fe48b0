"""This process's place among those that torchrun, deepspeed or Slurm started, and its end."""

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def launched_size() -> int:
    """The number of processes that were started; 1 without a launcher."""
    return _said("WORLD_SIZE", 1)


def launched_rank() -> int:
    """This process's number among them."""
    return _said("RANK", 0)


def launched_local_rank() -> int:
    """This process's number among those of its host."""
    return _said("LOCAL_RANK", 0)


def without_local_rank(words: Sequence[str]) -> list[str]:
    """A command line without the --local_rank=N that `deepspeed` puts into it; the environment says the same."""
    return [word for word in words if not (word.startswith("--local_rank=") and "LOCAL_RANK" in os.environ)]


def end(status: int, *, at_once: bool = False) -> NoReturn:
    """End this process with an exit status; where several were started, or `at_once`, without the interpreter's own teardown.

    DeepSpeed holds its process groups, and so their native threads, for good. Tearing the interpreter down under them
    aborts a rank now and then after its work is done, and its launcher would take the run for failed.
    """
    if launched_size() == 1 and not at_once:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _said(name: str, otherwise: int) -> int:
    said = os.environ.get(name)
    if said is None and "SLURM_STEP_ID" in os.environ:  # without a step this is the shell of an allocation
        said = os.environ.get(_SLURM[name])
    return int(said or otherwise)
