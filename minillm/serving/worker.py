"""The one thread that runs a server's model: requests wait in a bounded queue, and those for rows may share forward
passes.

In a pass of its own a request gets rows that are a function of it alone, to the last bit; in a shared one matrix products
have other shapes, and round otherwise.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from minillm.serving.server_metrics import ServerMetrics
from minillm.teachers.wire import RowsRequest, SampleRequest

Request = RowsRequest | SampleRequest


class QueueFull(Exception):
    """There is no room for another request. `retry_after`: seconds until there may be."""

    def __init__(self, retry_after: int):
        super().__init__(f"the queue is full; try again in {retry_after} s")
        self.retry_after = retry_after


class Stopping(Exception):
    """The server takes no new request."""


@dataclass
class Job:
    """A request that waits, and what its client waits for."""

    request: Request
    answer: Future[bytes] = field(default_factory=Future)


class Worker:
    """See the module. Requests are answered in the order in which they came.

    Args:
        answer_rows: answers several requests for rows from one pass, as ServedModel.rows.
        answer_prompts: answers one request for answers, as ServedModel.sample.
        batch_tokens: padded positions that requests share a forward pass up to; one that has more has a pass of its own.
            None: every request has.
        queue_size: requests that may wait.
    """

    def __init__(
        self,
        answer_rows: Callable[[list[RowsRequest]], list[bytes]],
        answer_prompts: Callable[[SampleRequest], bytes],
        metrics: ServerMetrics,
        *,
        batch_tokens: int | None,
        queue_size: int,
    ):
        self.answer_rows, self.answer_prompts, self.metrics = answer_rows, answer_prompts, metrics
        self.batch_tokens, self.queue_size = batch_tokens, queue_size
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._seconds = 0.1  # of a request, a running mean
        self.busy = False  # the model is running
        self._thread = threading.Thread(target=self._run, name="minillm-serve", daemon=True)

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._jobs)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Answer what is in the queue, take nothing more, and return when that is done."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def submit(self, request: Request) -> Future[bytes]:
        """Put a request into the queue. Cancelling what is returned takes it out again, if it has not begun.

        Raises QueueFull, and Stopping after `stop`.
        """
        with self._changed:
            if self._stopping:
                raise Stopping("the server is stopping")
            if len(self._jobs) >= self.queue_size:
                raise QueueFull(max(1, round(len(self._jobs) * self._seconds)))
            job = Job(request)
            self._jobs.append(job)
            self._changed.notify_all()
        return job.answer

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._stopping:
                    self._changed.wait()
                if not self._jobs:
                    return
                jobs = self._take()
            self.busy = bool(jobs)
            if jobs:
                self._answer(jobs)
                self.busy = False

    def _take(self) -> list[Job]:
        """The next request with those behind it that go into the same pass; clients that have left are passed over."""
        jobs: list[Job] = []
        sequences = longest = 0
        while self._jobs:
            job = self._jobs[0]
            if jobs:
                rows = isinstance(job.request, RowsRequest) and isinstance(jobs[0].request, RowsRequest)
                if self.batch_tokens is None or not rows:
                    break
                together = (sequences + len(job.request.sequences)) * max(longest, job.request.longest)
                if together > self.batch_tokens:
                    break
            self._jobs.popleft()
            if not job.answer.set_running_or_notify_cancel():
                continue
            jobs.append(job)
            if isinstance(job.request, RowsRequest):
                sequences, longest = sequences + len(job.request.sequences), max(longest, job.request.longest)
        return jobs

    def _answer(self, jobs: list[Job]) -> None:
        started, requests = time.perf_counter(), [job.request for job in jobs]
        try:
            if isinstance(requests[0], RowsRequest):
                answers = self.answer_rows(requests)
            else:
                answers = [self.answer_prompts(requests[0])]
        except Exception as error:  # of one request or of the machine: the server goes on
            if len(jobs) == 1:
                jobs[0].answer.set_exception(error)
            for job in jobs if len(jobs) > 1 else ():  # one of them, or all together, were too much
                self._answer([job])
            return
        for job, answer in zip(jobs, answers, strict=True):
            job.answer.set_result(answer)
        seconds = time.perf_counter() - started
        self._seconds += 0.1 * (seconds / len(jobs) - self._seconds)
        self.metrics.passed(seconds, requests)


def padded_tokens(request: Request) -> int:
    """Positions that a request takes by itself, where every text is as long as the longest."""
    if isinstance(request, RowsRequest):
        return len(request.sequences) * request.longest
    most = request.sampling.get("max_new_tokens", 1)
    return len(request.prompts) * (max(map(len, request.prompts)) + (most if isinstance(most, int) else 1))
