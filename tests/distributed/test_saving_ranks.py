"""Checkpoints of two ranks, written by a thread of each while both go on, whole or with an error for both.

Run as a program it is one of the ranks: FOLDER.
"""

import errno
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from minillm import UserError
from minillm.config.training import SaveConfig
from minillm.distributed import collectives, group
from minillm.distributed.launcher import end
from minillm.storage import atomic, checkpoint
from minillm.storage.manifest import find_damage
from minillm.storage.snapshot import SavedPart
from minillm.train.saver import Saver


def saver_of(folder: Path, write: Callable[[torch.Tensor, Path], None], state: torch.Tensor) -> Saver:
    """One whose model is a tensor."""
    saver = Saver(SaveConfig(), None, folder, print)
    saver._student = lambda: [SavedPart(lambda: state, write)]
    return saver


def both_go_on_meanwhile(folder: Path, rank: int) -> None:
    opened, state = threading.Event(), torch.full((3,), float(rank))

    def write(state: torch.Tensor, where: Path) -> None:
        assert opened.wait(60)
        torch.save(state, where / f"{rank}.pt")

    saver = saver_of(folder, write, state)
    saver.model(folder / "best")
    for step in range(20):  # what the steps exchange
        assert collectives.gather([step, rank]) == [[step, 0], [step, 1]]
        saver.check()
    assert not (folder / "best").exists()
    state.fill_(9.0)
    if rank:  # one after the other
        opened.set()
    collectives.barrier()
    saver.check()
    opened.set()
    saver.finish()
    assert find_damage(folder / "best") is None
    assert [torch.load(folder / "best" / f"{one}.pt").tolist() for one in range(2)] == [[0.0] * 3, [1.0] * 3]


def a_failure_is_everyones(folder: Path, rank: int, failing: int, error: Exception) -> None:
    """Of the rank that writes its part, and of rank 0 as it puts the folder in place."""

    def write(state: torch.Tensor, where: Path) -> None:
        if rank == failing:
            raise error

    saver = saver_of(folder, write, torch.zeros(1))
    saver.model(folder / "never")
    _fails_everywhere(saver, rank, failing, error)


def rank_0_cannot_put_it_in_place(folder: Path, rank: int) -> None:
    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    saver, put = saver_of(folder, lambda *_: None, torch.zeros(1)), atomic._put_in_place
    atomic._put_in_place = full
    saver.model(folder / "never")
    _fails_everywhere(saver, rank, 0, OSError(errno.ENOSPC, "no space left"))
    atomic._put_in_place = put


def rank_0_cannot_begin_or_tidy_up(folder: Path, rank: int) -> None:
    """Before its part is asked for, and after the checkpoint is in place."""

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    for place, name in ((atomic, "_delete"), (checkpoint, "remove_folder")):
        saver, real = saver_of(folder, lambda *_: None, torch.zeros(1)), getattr(place, name)
        (folder / "checkpoint-1").mkdir(exist_ok=True)
        saver.keep = 1
        if rank == 0:
            setattr(place, name, full)
        saver.checkpoint(2, [], [], wait=False)
        _fails_everywhere(saver, rank, 0, OSError(errno.ENOSPC, "no space left"))
        setattr(place, name, real)
        assert (folder / "checkpoint-1").exists()


def _fails_everywhere(saver: Saver, rank: int, failing: int, error: Exception) -> None:
    found = None
    for _ in range(10_000):  # as steps do
        try:
            saver.check()
        except Exception as problem:
            found = problem
            break
    assert type(found) is type(error), found
    if isinstance(error, OSError):
        assert found.errno == errno.ENOSPC and "no space left" in str(found)
    else:
        assert str(found) == (str(error) if rank == failing else f"rank {failing}: {error}")
    saver.finish()  # nothing is left of it
    assert not (saver.output_dir / "never").exists()
    assert collectives.gather(rank) == [0, 1]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    group.join(folder)
    rank = collectives.rank()
    both_go_on_meanwhile(folder, rank)
    a_failure_is_everyones(folder, rank, 1, UserError("weights of another shape"))
    a_failure_is_everyones(folder, rank, 0, OSError(errno.ENOSPC, "no space left"))
    rank_0_cannot_put_it_in_place(folder, rank)
    rank_0_cannot_begin_or_tidy_up(folder, rank)
    group.leave()
    end(0)


def test_two_ranks_write_while_they_go_on(tmp_path, start, finish):
    finish(start(2, __file__, str(tmp_path)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
