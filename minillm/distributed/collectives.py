"""Exchange of small things between the ranks of a run, and the slices that they work on. Nothing to do for one process.

What crosses over is JSON or the bytes of tensors, never a pickle.
"""

import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minillm import UserError

T = TypeVar("T")
_beside: dict[dist.ProcessGroup, dist.ProcessGroup] = {}  # of the group of a run, a second one of the same ranks
_thread = threading.local()  # `group`: that by which this thread exchanges, where it is not the run's


def group_beside() -> dist.ProcessGroup | None:
    """A second group of the same ranks, by which a thread may exchange while the run does. None for one process.

    All ranks must ask for it together; they get the same one every time.
    """
    if world_size() == 1:
        return None
    run = dist.group.WORLD
    if run not in _beside:
        _beside[run] = dist.new_group(backend="gloo")
    return _beside[run]


@contextmanager
def exchanging_by(group: dist.ProcessGroup | None) -> Iterator[None]:
    """A context in which this thread exchanges through a group of its own."""
    _thread.group = group
    try:
        yield
    finally:
        _thread.group = None


def exchanges_beside() -> bool:
    """True where this thread exchanges through a group of its own."""
    return _group() is not None


def _group() -> dist.ProcessGroup | None:
    return getattr(_thread, "group", None)


def rank() -> int:
    """This process's number in its group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of ranks in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank_slice(count: int) -> range:
    """This rank's indices of `count` items: every world_size-th, from its own number on."""
    return range(rank(), count, world_size())


def even_rank_slice(count: int) -> list[int]:
    """`rank_slice`, filled up with item 0 where another rank has one more: as many indices on every rank."""
    mine, most = list(rank_slice(count)), -(-count // world_size())
    return mine + [0] * (most - len(mine))


def owner(index: int) -> int:
    """The rank whose `rank_slice` holds this index."""
    return index % world_size()


def interleave(parts: Sequence[Sequence[T]]) -> list[T]:
    """The items of all rank slices, one sequence per rank, in their order before they were dealt out."""
    return [parts[index % len(parts)][index // len(parts)] for index in range(sum(map(len, parts)))]


def barrier() -> None:
    """Wait for all ranks."""
    gather(None)


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of ranks: anything that JSON can say."""
    if world_size() == 1:
        return [json.loads(json.dumps(value))]
    mine = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(part.numpy().tobytes()) for part in _gather_bytes(mine)]


def anywhere(value: bool) -> bool:
    """True where the value is true on any rank."""
    return value if world_size() == 1 else any(gather(value))


def total(values: Mapping[str, float]) -> dict[str, float]:
    """Sums over the ranks by name; a rank need not have all names."""
    sums: dict[str, float] = {}
    for part in gather(dict(values)):
        for name, value in part.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def gather_tensors(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Every rank's named tensors, on the CPU; names, shapes and dtypes may differ from rank to rank."""
    if world_size() == 1:
        return [dict(tensors)]
    heads = gather({name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()})
    # torch alone touches the bytes: what Python copies keeps its other threads from running, for seconds a gigabyte
    flat = [tensor.detach().cpu().reshape(-1).view(torch.uint8) for tensor in tensors.values()]
    parts = _gather_bytes(torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8))
    return [_named(head, part) for head, part in zip(heads, parts, strict=True)]


def exchange(outgoing: Sequence[Tensor]) -> list[Tensor]:
    """Send each rank a tensor of its own; returns what every rank has sent to this one, in the order of ranks.

    Args:
        outgoing: one tensor per rank, (bytes,) uint8 on the CPU, of any length.
    """
    counts = [sent[rank()] for sent in gather([len(part) for part in outgoing])]
    received = torch.empty(sum(counts), dtype=torch.uint8)
    lengths = [len(part) for part in outgoing]
    dist.all_to_all_single(received, torch.cat(list(outgoing)), counts, lengths, group=_group())
    return list(received.split(counts))


def on_rank_0(work: Callable[[], T]) -> T:
    """The result of `work` (anything that JSON can say), done by rank 0 alone. Raises as `together` does."""
    if world_size() == 1:
        return work()
    return gather(together(lambda: work() if rank() == 0 else None))[0]


def together(work: Callable[[], T]) -> T:
    """The result of `work`, which every rank does without any exchange inside; where one rank fails, all do.

    A failing rank raises its own error. The others name that rank, and raise what the command line treats alike: a
    UserError with the same exit status, an OSError with the same number. They raise RuntimeError for a defect.
    """
    if world_size() == 1:
        return work()
    result, problem = None, None
    try:
        result = work()
    except Exception as error:
        problem = error
    failures = gather(None if problem is None else _failure(problem))
    if problem is not None:
        raise problem
    for other, failure in enumerate(failures):
        if failure is not None:
            raise _error_of(other, failure)
    return result


def _failure(error: Exception) -> dict[str, Any]:
    """An error in words of JSON, for `_error_of` on the other ranks."""
    if isinstance(error, UserError):
        return {"text": str(error), "exit_status": error.exit_status}
    if isinstance(error, OSError) and error.errno is not None:
        return {"text": error.strerror, "errno": error.errno, "path": str(error.filename or "")}
    return {"text": f"{type(error).__name__}: {error}"}


def _error_of(other: int, failure: Mapping[str, Any]) -> Exception:
    if "exit_status" in failure:
        error = UserError(f"rank {other}: {failure['text']}")
        error.exit_status = failure["exit_status"]
        return error
    if "errno" in failure:
        return OSError(failure["errno"], f"{failure['text']} (on rank {other})", failure["path"] or None)
    return RuntimeError(f"rank {other}: {failure['text']}")


def _named(head: Mapping[str, list], data: Tensor) -> dict[str, Tensor]:
    """Tensors by name from {name: [dtype, *shape]} and their bytes one after the other."""  # data: (bytes,) uint8
    tensors, start = {}, 0
    for name, (dtype, *shape) in head.items():
        kind = getattr(torch, dtype)
        end = start + math.prod(shape) * kind.itemsize
        tensors[name] = data[start:end].clone().view(kind).view(shape)  # a copy begins where its dtype may
        start = end
    return tensors


def _gather_bytes(mine: Tensor) -> list[Tensor]:  # (bytes,) uint8 -> one such tensor per rank
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(mine)]), group=_group())
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded, group=_group())
    return [part[: int(length)] for part, length in zip(parts, lengths, strict=True)]
