"""A process's place in its run, as each launcher says it in the environment."""

import os
import subprocess
import sys

import pytest

from minillm.distributed.launcher import launched_local_rank, launched_rank, launched_size, without_local_rank

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID")


@pytest.fixture
def launched(monkeypatch):
    """A function that sets the environment and returns (size, rank, local rank)."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)

    def say(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return launched_size(), launched_rank(), launched_local_rank()

    return say


def test_without_a_launcher_there_is_one_process(launched):
    assert launched() == (1, 0, 0)


def test_torchrun_and_deepspeed(launched):
    assert launched(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1") == (8, 5, 1)


def test_what_deepspeed_puts_into_the_command_line_is_in_the_environment(launched):
    words = ["--local_rank=1", "train", "run.yaml"]
    assert without_local_rank(words) == words
    launched(LOCAL_RANK="1")
    assert without_local_rank(words) == ["train", "run.yaml"]


def test_a_step_of_slurm(launched):
    assert launched(SLURM_STEP_ID="0", SLURM_PROCID="3", SLURM_NTASKS="4", SLURM_LOCALID="1") == (4, 3, 1)


def test_the_shell_of_an_allocation_is_one_process(launched):
    assert launched(SLURM_PROCID="0", SLURM_NTASKS="4", SLURM_LOCALID="0") == (1, 0, 0)


def test_torchrun_within_a_step_of_slurm_counts(launched):
    slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    assert launched(**slurm, RANK="9", WORLD_SIZE="16", LOCAL_RANK="1") == (16, 9, 1)


@pytest.mark.parametrize(("size", "printed"), [("1", "done, torn down"), ("2", "done")])
def test_one_of_several_processes_ends_without_the_teardown_of_the_interpreter(size, printed):
    code = """if True:
        import atexit
        from minillm.distributed.launcher import end
        atexit.register(print, ", torn down", end="")
        print("done", end="")
        end(3)"""
    environment = {**os.environ, "WORLD_SIZE": size}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (3, printed), result.stderr
