"""The processes of a run: who this one is, and how they exchange small things. With one process all of it is a no-op.

What crosses over is JSON or the bytes of tensors, never a pickle.
"""

import atexit
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor

from minillm import UserError
from minillm.distributed.heartbeat import Heartbeat, Peer
from minillm.distributed.launcher import launched_local_rank, launched_rank, launched_size
from minillm.distributed.waiting_time import count_waits

T = TypeVar("T")
_heartbeat: Heartbeat | None = None


def join(output_dir: Path) -> None:
    """A run begins: in the group that the environment names (torchrun, deepspeed or Slurm), alone where it names none.

    Until `leave`, a rank that is lost is noticed: the others say which one it was and stop (minillm.distributed.heartbeat).
    """
    global _heartbeat
    if not dist.is_initialized():
        _make_group()
    if _heartbeat is not None:  # of a run that ended in an error
        _heartbeat.end()
        _heartbeat = None
    if world_size() == 1:
        return
    told = gather({"peer": asdict(Peer.here(rank())), "run": uuid4().hex})
    peers = [Peer(**one["peer"]) for one in told]

    def stop(message: str) -> None:
        print(f"minillm: {message}", flush=True)
        record_failure(output_dir, message)
        os._exit(1)

    _heartbeat = Heartbeat(rank(), peers, told[0]["run"], stop)
    barrier()
    _heartbeat.start()


def leave() -> None:
    """The work of all ranks is done. The group stays, for another run of this process: DeepSpeed knows no second one."""
    global _heartbeat
    barrier()
    if _heartbeat is not None:
        _heartbeat.end()
        barrier()  # no rank needs the store any more, which may go with the process of rank 0
        _heartbeat = None


def _make_group() -> None:
    size = launched_size()
    # DeepSpeed and torch read these names alone
    os.environ |= {"RANK": str(launched_rank()), "WORLD_SIZE": str(size), "LOCAL_RANK": str(launched_local_rank())}
    if size > 1 and "MASTER_ADDR" not in os.environ:
        raise UserError(f"{size} processes were started, but MASTER_ADDR, the host of the first one, is not set")
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


def lost_rank_behind(error: Exception) -> str | None:
    """Where an error of this rank comes from the loss of another: what the remaining ranks say. None where it does not.

    Waits for the other ranks: for a sign of life of each, or until one is lost.
    """
    lost = None if _heartbeat is None else _heartbeat.after(error)
    return None if lost is None else lost.message


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_slice(count: int) -> range:
    """The indices of `count` things that are this rank's: every world_size-th."""
    return range(rank(), count, world_size())


def even_rank_slice(count: int) -> list[int]:
    """`rank_slice`, with a thing of another rank where that makes it as many on every rank."""
    mine, most = list(rank_slice(count)), -(-count // world_size())
    return mine + [0] * (most - len(mine))


def anywhere(value: bool) -> bool:
    """Whether it is so on any rank."""
    return value if world_size() == 1 else any(gather(value))


def barrier() -> None:
    """Wait for all ranks."""
    gather(None)


def gather(value: Any) -> list[Any]:
    """What every rank has, in the order of ranks: anything that JSON can say."""
    if world_size() == 1:
        return [json.loads(json.dumps(value))]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in _gather_bytes(mine)]


def gather_tensors(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every rank's named tensors, on the CPU."""
    if world_size() == 1:
        return [dict(tensors)]
    heads = gather({name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()})
    # torch alone touches the bytes: what Python copies keeps its other threads from running, for seconds a gigabyte
    flat = [tensor.detach().cpu().reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    parts = _gather_bytes(torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8))
    return [_named(head, part) for head, part in zip(heads, parts, strict=True)]


def _named(head: Mapping[str, list], data: Tensor) -> dict[str, Tensor]:
    """Tensors by name from {name: [dtype, *shape]} and their bytes one after the other."""  # data: (bytes,) uint8
    tensors, start = {}, 0
    for name, (dtype, *shape) in head.items():
        kind = getattr(torch, dtype)
        end = start + math.prod(shape) * kind.itemsize
        tensors[name] = data[start:end].clone().view(kind).view(shape)  # a copy begins where its dtype may
        start = end
    return tensors


def exchange(outgoing: Sequence[Tensor]) -> list[Tensor]:
    """One tensor of bytes, (bytes,) uint8 on the CPU, for each rank; gives what each rank had for this one."""
    counts = [sent[rank()] for sent in gather([len(part) for part in outgoing])]
    received = torch.empty(sum(counts), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(list(outgoing)), counts, [len(part) for part in outgoing])
    return list(received.split(counts))


def owner(index: int) -> int:
    """The rank that `rank_slice` deals this index to."""
    return index % world_size()


def interleave(parts: Sequence[Sequence[T]]) -> list[T]:
    """What was dealt out by `rank_slice`, in its first order."""
    return [parts[index % len(parts)][index // len(parts)] for index in range(sum(map(len, parts)))]


def total(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over the ranks by name; a rank need not have all names."""
    sums: dict[str, float] = {}
    for part in gather(dict(values)):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def on_rank_0(work: Callable[[], T]) -> T:
    """Do it on rank 0 alone; the others get its result (what JSON can say), or its error."""
    if world_size() == 1:
        return work()
    return gather(together(lambda: work() if rank() == 0 else None))[0]


def together(work: Callable[[], T]) -> T:
    """Do it on every rank, without any exchange inside; where one fails, all raise its error."""
    if world_size() == 1:
        return work()
    result, problem = None, None
    try:
        result = work()
    except Exception as error:
        problem = error
    problems = gather(None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    for other, told in enumerate(problems):
        if told is not None:
            raise RuntimeError(f"rank {other}: {told}")
    return result


def _gather_bytes(mine: Tensor) -> list[Tensor]:  # (bytes,) uint8 -> one such a rank
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(mine)]))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return [part[: int(length)] for part, length in zip(parts, lengths, strict=True)]


def record_failure(output_dir: Path, text: str) -> None:
    """Append to this rank's log of failures, ranks/rank-N.log in the run's folder."""
    folder = output_dir / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"rank-{rank()}.log").open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {text}\n")
