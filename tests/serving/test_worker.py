"""Requests share passes up to a budget of positions, in the order in which they came, and whoever has left is passed over."""

import threading

import pytest
import torch

from minillm.models.batch import TokenSequence
from minillm.serving.server_metrics import ServerMetrics
from minillm.serving.worker import QueueFull, Stopping, Worker
from minillm.teachers.wire import RowsRequest, SampleRequest, unpack


def rows_request(sequences: int, length: int) -> RowsRequest:
    """A request of `sequences` texts that take `length` positions each."""
    return RowsRequest(tuple(TokenSequence([1] * (length - 1), [2, 3]) for _ in range(sequences)))


SAMPLE = SampleRequest([[1]], [0], 0, 0, {"max_new_tokens": 1}, [256], 0, 257)


class Recorder:
    """Answers every request with its place among all, and remembers the passes. The first pass waits for `go_on`."""

    def __init__(self, *, fails=lambda requests: False, **options):
        self.passes, self.go_on, self.begun, self.fails = [], threading.Event(), threading.Event(), fails
        self.worker = Worker(
            self.rows, lambda one: self.rows([one])[0], ServerMetrics(), **{"queue_size": 99} | options
        )
        self.worker.start()
        self.first = self.worker.submit(rows_request(1, 2))
        self.begun.wait()

    def rows(self, requests):
        self.begun.set()
        self.go_on.wait(30)
        self.passes.append(list(requests))
        if self.fails(requests):
            raise MemoryError("no room")
        return [id(one) for one in requests]

    def asked(self, *requests) -> list[int]:
        """The numbers of requests in each pass that came while the first one ran."""
        promised = [self.worker.submit(one) for one in requests]
        self.go_on.set()
        self.worker.stop()
        assert [one.result() for one in promised] == [id(one) for one in requests]
        return [len(one) for one in self.passes[1:]]


def test_passes_are_shared_up_to_the_budget():
    # 2 x 5 and 1 x 5 are 15 positions; with 1 x 8 all four texts would take 8 each: 32 of 24
    requests = [rows_request(2, 5), rows_request(1, 5), rows_request(1, 8), rows_request(1, 4), rows_request(1, 3)]
    assert Recorder(batch_tokens=24).asked(*requests) == [2, 3]


def test_a_request_beyond_the_budget_has_a_pass_of_its_own():
    assert Recorder(batch_tokens=24).asked(rows_request(1, 4), rows_request(9, 9), rows_request(1, 4)) == [1, 1, 1]


def test_without_a_budget_every_request_has_a_pass_of_its_own():
    assert Recorder(batch_tokens=None).asked(*(rows_request(1, 4) for _ in range(3))) == [1, 1, 1]


def test_answers_keep_their_place_among_rows():
    requests = [rows_request(1, 4), SAMPLE, SAMPLE, rows_request(1, 4), rows_request(1, 4)]
    assert Recorder(batch_tokens=99).asked(*requests) == [1, 1, 1, 2]


def test_who_has_left_is_passed_over():
    recorder = Recorder(batch_tokens=None)
    left = recorder.worker.submit(rows_request(1, 4))
    assert left.cancel()
    assert recorder.asked(rows_request(1, 4)) == [1]


def test_requests_that_are_too_much_together_are_answered_one_by_one():
    recorder = Recorder(batch_tokens=99, fails=lambda requests: len(requests) > 2)
    assert recorder.asked(*(rows_request(1, 4) for _ in range(3))) == [3, 1, 1, 1]


def test_one_that_fails_alone_fails_for_its_client():
    recorder = Recorder(batch_tokens=99, fails=lambda requests: any(one.count == 6 for one in requests))
    wrong = recorder.worker.submit(rows_request(3, 4))
    assert recorder.asked(rows_request(1, 4)) == [2, 1, 1]
    with pytest.raises(MemoryError):
        wrong.result()


def test_a_full_queue_and_a_stopped_worker_take_nothing():
    recorder = Recorder(batch_tokens=None, queue_size=1)
    recorder.worker.submit(rows_request(1, 4))
    with pytest.raises(QueueFull) as full:
        recorder.worker.submit(rows_request(1, 4))
    assert full.value.retry_after >= 1
    recorder.go_on.set()
    recorder.worker.stop()
    with pytest.raises(Stopping):
        recorder.worker.submit(rows_request(1, 4))


def test_rows_of_a_shared_pass_are_those_of_the_requests_to_rounding(served_model):
    requests = [
        rows_request(1, 3),
        RowsRequest((TokenSequence([4, 5, 6, 7], [8]), TokenSequence([9], [10])), "top_k", 3),
    ]
    together = served_model.rows(requests)
    for request, body in zip(requests, together, strict=True):
        alone, shared = unpack(served_model.rows([request])[0]), unpack(body)
        assert alone.keys() == shared.keys()
        for name in alone:
            torch.testing.assert_close(shared[name], alone[name], rtol=1e-5, atol=1e-5)
