"""The order of copies and computing on a GPU, told by stand-ins for its streams; and that a CPU has neither."""

import contextlib
from itertools import pairwise

import pytest
import torch

from minillm.engine.device_copies import DeviceCopies


class Stream:
    """Remembers what is launched on it. An operation comes after those before it on its stream, and after what it waits for."""

    def __init__(self, after: dict):
        self.after, self.last = after, None

    def launch(self, name: object) -> None:
        self.after.setdefault(name, set())
        if self.last is not None:
            self.after[name].add(self.last)
        self.last = name

    def record_event(self) -> object:
        event = object()
        self.launch(event)
        return event

    def wait_event(self, event: object) -> None:
        waiting = object()
        self.launch(waiting)
        self.after[waiting].add(event)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())


class Term:
    """Says on which stream it is copied."""

    def __init__(self, number: int, gpu: "Gpu"):
        self.number, self.gpu = number, gpu

    def to(self, device: torch.device) -> "Term":
        self.gpu.current.launch(("copy", self.number))
        return self


class Gpu:
    """Two streams in the place of torch.cuda's, and the order that they keep."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.after: dict = {}
        self.computing, self.copying = Stream(self.after), Stream(self.after)
        self.current = self.computing
        patch.setattr(torch.cuda, "Stream", lambda device: self.copying)
        patch.setattr(torch.cuda, "current_stream", lambda device: self.computing)
        patch.setattr(torch.cuda, "stream", self.on)

    @contextlib.contextmanager
    def on(self, stream: Stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def step(self, copies: DeviceCopies, numbers: range) -> None:
        taken = []
        for term in copies.of([Term(number, self) for number in numbers]):
            taken.append(term.number)
            self.computing.launch(("term", term.number))
        assert taken == list(numbers)

    def comes_after(self, later: object, earlier: object) -> bool:
        seen, left = set(), [later]
        while left:
            for one in self.after[left.pop()] - seen:
                seen.add(one)
                left.append(one)
        return earlier in seen


@pytest.fixture
def gpu(monkeypatch) -> Gpu:
    return Gpu(monkeypatch)


def test_a_term_is_copied_before_it_is_computed_on_and_while_the_one_before_it_is(gpu):
    gpu.step(DeviceCopies(torch.device("cuda")), range(5))
    for number in range(5):
        assert gpu.comes_after(("term", number), ("copy", number))
    for before, number in pairwise(range(5)):
        assert not gpu.comes_after(("copy", number), ("term", before))


def test_the_memory_of_a_term_is_not_copied_to_before_it_is_computed_on(gpu):
    """Two terms are held at a time, so that the copy of the second one after it may get its memory."""
    copies = DeviceCopies(torch.device("cuda"))
    gpu.step(copies, range(4))
    for number in range(2):
        assert gpu.comes_after(("copy", number + 2), ("term", number))
    gpu.step(copies, range(4, 6))
    assert gpu.comes_after(("copy", 4), ("term", 3)) and gpu.comes_after(("copy", 4), ("term", 2))


@pytest.mark.parametrize("count", [0, 1])
def test_few_terms_are_no_special_case(gpu, count):
    gpu.step(DeviceCopies(torch.device("cuda")), range(count))


def test_a_cpu_has_no_streams(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", pytest.fail)
    terms = [Term(number, gpu) for number in range(3)]
    assert list(DeviceCopies(torch.device("cpu")).of(terms)) == terms
