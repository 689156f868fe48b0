"""A group of two ranks: joined for one run after the other, and what the others are told where a rank ends or dies.

Run as a program it is one of the ranks: FOLDER.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from minillm import UserError
from minillm.distributed import collectives, group
from minillm.distributed.launcher import end


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    group.join(folder)
    collectives.barrier()
    group.leave()
    group.join(folder)  # another run
    if collectives.rank() == 1:
        error = ValueError("the disk is full")
        assert group.lost_rank_behind(error) is None
        print("mine", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        collectives.barrier()
    except RuntimeError as error:
        assert group.lost_rank_behind(error) is None  # it is explained: not lost, but ended by its own error
        print(*error.__notes__, flush=True)
    end(0)


def test_the_last_words_of_a_rank_reach_the_others(tmp_path, start):
    first, second = start(2, __file__, str(tmp_path))
    outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, -signal.SIGKILL), outputs
    assert "mine" in outputs[1]
    told = outputs[0]
    assert f"rank 1 (process {second.pid} on " in told and "stopped with ValueError: the disk is full" in told


def test_without_the_address_of_rank_0_several_processes_cannot_meet(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match="2 processes were started, but MASTER_ADDR is not set"):
        group.join(tmp_path)


def test_failures_of_a_rank_are_added_to_its_log(tmp_path):
    for text in ("first", "second"):
        group.record_failure(tmp_path / "run", text)
    lines = (tmp_path / "run" / "ranks" / "rank-0.log").read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["first", "second"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
