"""The group of a run's ranks: joined when the run begins, left when all are done, with a heartbeat in between."""

import atexit
import os
import time
from dataclasses import asdict
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed as dist

from minillm import UserError
from minillm.distributed.collectives import barrier, gather, rank, world_size
from minillm.distributed.heartbeat import HeartbeatMonitor, Peer
from minillm.distributed.launcher import launched_local_rank, launched_rank, launched_size
from minillm.distributed.waiting_time import count_waits

_monitor: HeartbeatMonitor | None = None


def join(output_dir: Path) -> None:
    """Begin a run: in the group that the environment names (torchrun, deepspeed or Slurm), alone where it names none.

    Until `leave`, a lost rank is noticed: the others say which one it was, in ranks/ of `output_dir` too, and stop.
    Raises UserError where several processes were started and nothing says how they find each other.
    """
    global _monitor
    if not dist.is_initialized():
        _make_group()
    if _monitor is not None:  # of a run that ended in an error
        _monitor.end()
        _monitor = None
    if world_size() == 1:
        return
    told = gather({"peer": asdict(Peer.here(rank())), "run": uuid4().hex})
    peers = [Peer(**one["peer"]) for one in told]

    def stop(message: str) -> None:
        print(f"minillm: {message}", flush=True)
        record_failure(output_dir, message)
        os._exit(1)

    _monitor = HeartbeatMonitor(rank(), peers, told[0]["run"], stop)
    barrier()
    _monitor.start()


def leave() -> None:
    """End a run once all ranks are done. The group stays for the next run of this process: DeepSpeed knows only one."""
    global _monitor
    barrier()
    if _monitor is not None:
        _monitor.end()
        barrier()  # no rank needs the store any more, which may go with the process of rank 0
        _monitor = None


def lost_rank_behind(error: Exception) -> str | None:
    """The message of the remaining ranks where an error of this rank comes from a lost one; None where it does not.

    Waits until every other rank has given a sign of life after the error, or one is lost.
    """
    lost = None if _monitor is None else _monitor.lost_behind(error)
    return None if lost is None else lost.message


def record_failure(output_dir: Path, text: str) -> None:
    """Append to this rank's log of failures, ranks/rank-N.log in the run's folder."""
    folder = output_dir / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{rank()}.log").open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")


def _make_group() -> None:
    size = launched_size()
    # DeepSpeed and torch read these names alone
    os.environ |= {"RANK": str(launched_rank()), "WORLD_SIZE": str(size), "LOCAL_RANK": str(launched_local_rank())}
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(
            f"{size} processes were started, but MASTER_ADDR is not set: export it as the name of the host of rank 0"
        )
    os.environ.setdefault("MASTER_PORT", "29500")
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(launched_local_rank())
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if size > 1:
        count_waits()
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)  # of several, launcher.end leaves the groups to the system
