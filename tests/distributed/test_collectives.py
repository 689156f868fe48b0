"""What ranks say to each other, how long they wait for it, and what the others are told where one of them ends.

Run as a program it is one of the ranks: FOLDER.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from minillm.distributed import collectives
from minillm.distributed.launcher import end
from minillm.distributed.waiting_time import waited

EMPTY = {"none": torch.empty(0, 5, dtype=torch.bfloat16)}


def tensors(rank: int) -> dict[str, torch.Tensor]:
    """Of odd sizes, so that bytes of one dtype begin where another's may not."""
    return {
        "flags": torch.tensor([True, False, True]),
        "numbers": torch.arange(6).view(2, 3).T + rank,
        "half": torch.full((rank, 3), 0.5, dtype=torch.bfloat16),
        "one": torch.tensor(float(rank), dtype=torch.float64),
        **EMPTY,
    }


def exchange(folder: Path) -> None:
    rank = collectives.rank()
    assert collectives.gather({"é": rank}) == [{"é": 0}, {"é": 1}]
    assert collectives.total({"both": 1.0, f"of {rank}": 2.0}) == {"both": 2.0, "of 0": 2.0, "of 1": 2.0}
    for made in (tensors, lambda rank: EMPTY, lambda rank: {}, lambda rank: EMPTY if rank else tensors(1)):
        for other, found in enumerate(collectives.gather_tensors(made(rank))):
            expected = made(other)
            assert found.keys() == expected.keys()
            for name, tensor in expected.items():
                assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    sent = [torch.full((2 * rank + other,), 10 * rank + other, dtype=torch.uint8) for other in range(2)]
    for other, found in enumerate(collectives.exchange(sent)):
        assert found.tolist() == [10 * other + rank] * (2 * other + rank)
    before = waited()
    time.sleep(1.0 * rank)
    collectives.barrier()
    print("waited", waited() - before, flush=True)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    collectives.join(folder)
    exchange(folder)
    collectives.leave()
    collectives.join(folder)  # another run
    if collectives.rank() == 1:
        error = ValueError("the disk is full")
        assert collectives.lost_rank_behind(error) is None
        print("mine", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        collectives.barrier()
    except RuntimeError as error:
        assert collectives.lost_rank_behind(error) is None  # it is explained: not lost, but ended by its own error
        print(*error.__notes__, flush=True)
    end(0)


def test_what_ranks_tell_each_other(tmp_path, start):
    first, second = start(2, __file__, str(tmp_path))
    outputs = [process.communicate(timeout=120)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, -signal.SIGKILL), outputs
    waits = [float(output.split("waited ")[1].split()[0]) for output in outputs]
    assert waits[0] > 0.8 and waits[1] < 0.5 * waits[0]
    assert "mine" in outputs[1]
    assert (
        f"rank 1 (process {second.pid} on " in outputs[0] and "stopped with ValueError: the disk is full" in outputs[0]
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
