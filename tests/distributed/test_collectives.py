"""Exchanges between two ranks, and what each raises where work done together fails on one of them.

Run as a program it is one of the ranks: FOLDER.
"""

import errno
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from minillm import UserError
from minillm.distributed import collectives, group
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


def exchange(rank: int) -> None:
    assert collectives.gather({"é": rank}) == [{"é": 0}, {"é": 1}]
    assert collectives.anywhere(rank == 1) and not collectives.anywhere(False)
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
    assert collectives.on_rank_0(lambda: {"rank": rank}) == {"rank": 0}
    assert collectives.together(lambda: rank) == rank


def slices(rank: int) -> None:
    for count in (0, 1, 4, 5):  # none, fewer than the ranks, as many for each, one more for the first
        mine = collectives.rank_slice(count)
        assert all(collectives.owner(index) == rank for index in mine)
        assert collectives.interleave(collectives.gather(list(mine))) == list(range(count))
        even = collectives.even_rank_slice(count)
        assert even[: len(mine)] == list(mine) and len(even) == (count + 1) // 2


class StoppedError(UserError):
    exit_status = 1


def failures(rank: int) -> None:
    """Rank 1 fails in every way, rank 0 in none."""

    def caught(error: Exception) -> Exception:
        def work():
            if rank == 1:
                raise error

        with pytest.raises(type(error) if rank else Exception) as info:
            collectives.together(work)
        return info.value

    for error, status in ((UserError("no such teacher"), 2), (StoppedError("step 3: loss nan"), 1)):
        found = caught(error)
        assert isinstance(found, UserError) and found.exit_status == status
        assert str(found) == (str(error) if rank else f"rank 1: {error}")
    found = caught(OSError(errno.ENOSPC, "no space left", "run"))
    assert isinstance(found, OSError) and found.errno == errno.ENOSPC and found.filename == "run"
    assert rank or found.strerror == "no space left (on rank 1)"
    found = caught(KeyError("x"))
    assert rank or (type(found) is RuntimeError and str(found) == "rank 1: KeyError: 'x'")


def waits(rank: int) -> None:
    collectives.barrier()
    before = waited()
    time.sleep(1.0 * rank)
    collectives.barrier()
    print("waited", waited() - before, flush=True)


def beside(rank: int) -> None:
    """A thread's exchanges meet those of the other rank's thread, whatever is exchanged meanwhile, and nobody waits for them."""
    second, found, error = collectives.group_beside(), [], []
    assert collectives.group_beside() is second

    def exchange_slowly() -> None:
        try:
            with collectives.exchanging_by(second):
                assert collectives.exchanges_beside()
                for number in range(5):
                    time.sleep(0.1 * rank)
                    found.append(collectives.gather(["thread", number, rank]))
            assert not collectives.exchanges_beside()
        except BaseException as problem:
            error.append(problem)

    thread = threading.Thread(target=exchange_slowly)
    thread.start()
    for number in range(50):
        assert collectives.gather(["run", number, rank]) == [["run", number, 0], ["run", number, 1]]
    before = waited()
    thread.join()  # of rank 0 half a second, in which its own waits for the other one's
    assert waited() == before and not collectives.exchanges_beside()
    assert not error and found == [[["thread", number, 0], ["thread", number, 1]] for number in range(5)]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    group.join(folder)
    for check in (exchange, slices, failures, beside, waits):
        check(collectives.rank())
    group.leave()
    end(0)


def test_two_ranks_exchange_and_fail_together(tmp_path, start, finish):
    first, second = (
        float(output.split("waited ")[1].split()[0]) for output in finish(start(2, __file__, str(tmp_path)))
    )
    assert first > 0.8 and second < 0.5 * first


def test_one_process_needs_no_group():
    assert (collectives.rank(), collectives.world_size()) == (0, 1) and collectives.group_beside() is None
    assert collectives.gather((1, None)) == [[1, None]], "as JSON would bring it over"
    assert list(collectives.rank_slice(3)) == collectives.even_rank_slice(3) == [0, 1, 2]
    assert collectives.interleave([["a", "b"]]) == ["a", "b"]
    with pytest.raises(UserError, match="^no such teacher$"):
        collectives.on_rank_0(lambda: (_ for _ in ()).throw(UserError("no such teacher")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
