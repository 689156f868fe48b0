"""Work on a CPU cut into pieces: as many workers as torch has threads, each of which computes with one thread.

An operation that all threads share ends when the last of them has done its part, and a chunk of rows takes hundreds of
small ones: where another process holds a core, every one of them waits for it. A worker takes the next piece when it is
done with its last.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from minillm.kernels.block_memory import FRESH, BlockMemory

T = TypeVar("T")


@dataclass(frozen=True)
class Worker:
    """The means by which a piece is computed."""

    turn: AbstractContextManager[None] = nullcontext()  # entered by one piece at a time, in the order of the pieces
    memory: BlockMemory = FRESH


def pieces(size: int, most: int) -> list[slice]:
    """All of `size` rows, at most `most` in a piece."""
    return [slice(start, min(start + most, size)) for start in range(0, size, most)]


def even_pieces(size: int, tensor: Tensor) -> list[slice]:
    """All of `size` rows in two pieces for every worker that `tensor` has, so that a slow one holds up little."""
    workers = workers_on(tensor)
    return pieces(size, max(1, size if workers < 2 else -(-size // (2 * workers))))


def share(work: Callable[[slice, Worker], T], parts: Sequence[slice], tensor: Tensor) -> list[T]:
    """work(piece, worker) of every piece, in their order, by the workers of the device of `tensor`; without autograd.

    Pieces are independent of each other, and so is what they write. What is not, a caller's function with a state,
    belongs into `with worker.turn:`. Nothing that `work` returns lies in its worker's memory. Raises what `work` raises.
    """
    workers = min(workers_on(tensor), len(parts))
    if workers < 2:
        worker = Worker(memory=BlockMemory(keeps=_computes(tensor) and len(parts) > 1))  # for this call
        return [_in_passing(work, part, worker) for part in parts]
    return _Call(work, parts).run(_pool.of(torch.get_num_threads()), workers)


def workers_on(tensor: Tensor) -> int:
    """The workers that `share` takes; 1 where the calling thread does it all: of a fake tensor nobody else knows the mode."""
    return torch.get_num_threads() if _computes(tensor) else 1


def _computes(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and type(tensor) is Tensor


def _in_passing(work: Callable[[slice, Worker], T], part: slice, worker: Worker) -> T:
    with worker.memory.passing():
        return work(part, worker)


class _Call:
    """The state that the workers of one call share."""

    def __init__(self, work: Callable[[slice, Worker], T], parts: Sequence[slice]):
        self.work, self.parts = work, parts
        self.results: list[T | None] = [None] * len(parts)
        self.taken = self.turn = 0  # pieces
        self.error: BaseException | None = None
        self.changed = threading.Condition()
        self.inference = torch.is_inference_mode_enabled()  # of the calling thread

    def run(self, pool: ThreadPoolExecutor, workers: int) -> list[T]:
        futures: list[Future] = [pool.submit(self._work) for _ in range(workers)]
        try:
            wait(futures)
        except BaseException as error:  # an interrupt: nobody writes on into memory that the caller gives back
            self._give_up(error)
            wait(futures)
        if self.error is not None:
            raise self.error
        return self.results

    def _work(self) -> None:
        with torch.inference_mode(self.inference), torch.no_grad():
            while (number := self._take()) is not None:
                worker = Worker(self._turn_of(number), _threads.memory)
                try:
                    self.results[number] = _in_passing(self.work, self.parts[number], worker)
                except BaseException as error:  # raised in the calling thread
                    self._give_up(error)

    def _take(self) -> int | None:
        with self.changed:
            if self.error is not None or self.taken == len(self.parts):
                return None
            self.taken += 1
            return self.taken - 1

    @contextmanager
    def _turn_of(self, number: int) -> Iterator[None]:
        with self.changed:
            self.changed.wait_for(lambda: self.turn == number or self.error is not None)
            if self.error is not None:
                raise self.error
        yield
        with self.changed:
            self.turn = number + 1
            self.changed.notify_all()

    def _give_up(self, error: BaseException) -> None:
        with self.changed:
            self.error = self.error or error
            self.changed.notify_all()


class _Pool:
    """The workers, made when they are first needed, and anew in a forked process."""

    def __init__(self) -> None:
        self.threads, self.executor, self.lock = 0, None, threading.Lock()

    def of(self, threads: int) -> ThreadPoolExecutor:
        with self.lock:
            if self.threads != threads:
                ready = threading.Barrier(threads + 1)
                executor = ThreadPoolExecutor(threads, "minillm-losses", initializer=_compute_alone, initargs=(ready,))
                for _ in range(threads):
                    executor.submit(int)  # starts a thread
                ready.wait()
                # what a thread says of itself is also what later ones begin with, those of others too
                torch.set_num_threads(threads)
                if self.executor is not None:
                    self.executor.shutdown(wait=False)
                self.threads, self.executor = threads, executor
            return self.executor


def _compute_alone(ready: threading.Barrier) -> None:
    torch.get_num_threads()  # asked for the first time, a thread takes the number of the process
    torch.set_num_threads(1)
    _threads.memory = BlockMemory(keeps=True)
    ready.wait()


_threads = threading.local()  # of each worker: its memory
_pool = _Pool()
os.register_at_fork(after_in_child=_pool.__init__)
