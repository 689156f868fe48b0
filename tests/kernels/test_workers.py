"""Workers of one thread each: the results of one thread, in order, whatever happens in a piece."""

import os
import threading
import time

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.kernels import rows_torch, workers
from minillm.kernels.block_memory import BlockMemory
from minillm.kernels.divergences import FIELDS, RowSpec
from minillm.kernels.softmax_torch import Ids
from minillm.kernels.workers import even_pieces, pieces, share
from minillm.losses import LMHead, TopK, linear_divergence, linear_objective

ROWS, VOCABULARY, HIDDEN = 48, 211, 16
PART = slice(0, 1)


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_blocks(monkeypatch):
    """Five rows a block, seven ids a tile."""
    monkeypatch.setattr(rows_torch, "BLOCK_BYTES", 5 * VOCABULARY * 4)
    monkeypatch.setattr("minillm.kernels.head.WEIGHT_TILE_ROWS", 7)


def used_threads(monkeypatch) -> set[str]:
    """The names of the threads in which softmaxes are taken from now on."""
    found, softmax = set(), torch.softmax

    def seen(*args, **kwargs):
        found.add(threading.current_thread().name)
        return softmax(*args, **kwargs)

    monkeypatch.setattr(torch, "softmax", seen)
    return found


def models(*, grad: bool = True) -> tuple:
    torch.manual_seed(0)
    hidden, weight = torch.randn(ROWS, HIDDEN) * 2, torch.randn(VOCABULARY, HIDDEN) * 0.4
    other, bias = torch.randn(ROWS, HIDDEN), torch.randn(VOCABULARY)
    for tensor in (hidden, weight, bias):
        tensor.requires_grad_(grad)
    return hidden, weight, bias, other


def by_divergence(heads, weight, bias):
    hidden, *_, other = heads
    return linear_divergence(
        hidden, LMHead(weight, bias, softcap=9.0), other, LMHead(weight.detach().flip(0)), divergence="jsd"
    )


def by_sum(heads, weight, bias):
    hidden, *_, other = heads
    both = LMHead.sum_of(LMHead(weight, bias), LMHead(weight.detach().flip(0), softcap=3.0))
    return linear_divergence((hidden, other), both, other, LMHead(weight.detach()), divergence="forward_kl")


def by_top_k(heads, weight, bias):
    hidden, *_, other = heads
    logprobs, ids = (other @ weight.detach().t()).log_softmax(1).topk(9)
    return linear_divergence(
        hidden, LMHead(weight, bias, softcap=9.0), TopK(ids, logprobs), None, divergence="skew_forward_kl"
    )


def by_objective(heads, weight, bias):
    hidden, *_, other = heads
    total, _ = linear_objective(
        hidden, LMHead(weight, bias), other, LMHead(weight.detach()), labels=torch.arange(ROWS),
        fields=("reverse_kl", "student_logprob"),
        objective=lambda stats: stats.reverse_kl.square() - 0.1 * stats.student_logprob,
    )  # fmt: skip
    return total


@pytest.mark.parametrize("loss_of", [by_divergence, by_sum, by_top_k, by_objective])
def test_losses_and_gradients_are_those_of_one_thread(loss_of, three_threads, small_blocks, monkeypatch):
    found = []
    for threads in (3, 1):
        torch.set_num_threads(threads)
        names = used_threads(monkeypatch)
        hidden, weight, bias, other = models()
        loss = loss_of((hidden, weight, bias, other), weight, bias)
        loss.backward()
        found.append([loss.detach(), hidden.grad, weight.grad, bias.grad])
        here = {threading.current_thread().name}
        assert names == here if threads == 1 else names - here
        monkeypatch.undo()
        monkeypatch.setattr(rows_torch, "BLOCK_BYTES", 5 * VOCABULARY * 4)
        monkeypatch.setattr("minillm.kernels.head.WEIGHT_TILE_ROWS", 7)
    for several, one in zip(*found, strict=True):
        assert torch.allclose(several, one, rtol=1e-5, atol=1e-7) and one.any()


def every_field(softcap: float | None) -> list[torch.Tensor]:
    """Statistics and gradients of all fields, of logits some of which are banned."""
    torch.manual_seed(1)
    student, teacher = torch.randn(ROWS, VOCABULARY) * 3, torch.randn(ROWS, VOCABULARY)
    student[::7, 5], teacher[::4, :9] = -torch.inf, -torch.inf
    spec = RowSpec(tuple(FIELDS), temperature=1.5, student_scale=0.9, student_softcap=softcap, teacher_softcap=softcap)
    labels = torch.arange(ROWS) + 20
    statistics = rows_torch.row_statistics(student, teacher, labels, spec)
    coefficients = {name: torch.rand(ROWS) for name, field in FIELDS.items() if field.differentiable}
    found = [
        rows_torch.row_gradients(
            student.clone(), teacher, labels, statistics, {name: value}, spec, torch.float32
        )
        for name, value in coefficients.items()
    ]  # fmt: skip
    both = lambda rows, _: {name: value[rows] for name, value in coefficients.items()}  # noqa: E731
    found.append(rows_torch.row_loss_gradients(student.clone(), teacher, labels, spec, both, torch.float32))
    return [*statistics.values(), *found]


@pytest.mark.parametrize("softcap", [None, 9.0])
def test_temporaries_in_kept_memory_change_no_bit(softcap, three_threads, small_blocks, monkeypatch):
    kept = [every_field(softcap) for _ in range(2)]
    torch.set_num_threads(1)
    kept.append(every_field(softcap))
    monkeypatch.setattr(BlockMemory, "like", lambda *_: None)
    fresh = every_field(softcap)
    for of_call in kept:
        for here, there in zip(of_call, fresh, strict=True):
            assert torch.equal(here.nan_to_num(7.0), there.nan_to_num(7.0)), (here - there).abs().max()


def test_kept_memory_is_on_the_device_of_what_it_is_for():
    memory = BlockMemory(keeps=True)
    with torch.device("meta"):
        assert memory.like(torch.zeros(3, 4, device="cpu")).device.type == "cpu"


@pytest.mark.parametrize("softcap", [None, 9.0])
def test_temporaries_are_taken_once(softcap, three_threads, small_blocks, monkeypatch):
    """A block of the last one's size takes no new memory of it."""
    torch.set_num_threads(2)  # workers that have nothing yet
    block, taken = 5 // 2 * VOCABULARY * 4, []

    class Allocations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            read = {
                one.untyped_storage().data_ptr() for one in [*args, *(kwargs or {}).values()] if torch.is_tensor(one)
            }
            new = torch.is_tensor(result) and result.untyped_storage().data_ptr() not in read
            if new and result.untyped_storage().nbytes() >= block:
                taken.append(str(function))
            return result

    def watched(work, part, worker, done=workers._in_passing):
        with Allocations():
            return done(work, part, worker)

    def call() -> None:
        student, teacher = torch.randn(ROWS, VOCABULARY), torch.randn(ROWS, VOCABULARY)
        spec = RowSpec(tuple(FIELDS), student_softcap=softcap)

        def ones(rows, _):
            return {name: torch.ones(rows.stop - rows.start) for name, one in FIELDS.items() if one.differentiable}

        rows_torch.row_loss_gradients(student, teacher, torch.arange(ROWS), spec, ones, torch.float32)

    monkeypatch.setattr(workers, "_in_passing", watched)
    for _ in range(3):
        call()
    assert set(taken) == {"aten.empty.memory_format"}
    taken.clear()
    call()
    assert taken == []


def test_an_objective_is_called_by_one_at_a_time_in_the_order_of_the_rows(three_threads, small_blocks):
    hidden, weight, bias, other = models()
    calls, inside = [], []

    def objective(stats, number):
        inside.append(1)
        time.sleep(0.002)
        assert len(inside) == 1
        calls.extend(number.tolist())
        inside.clear()
        return stats.reverse_kl

    given = (hidden, LMHead(weight), other, LMHead(weight.detach()), None)
    linear_objective(*given, objective=objective, fields=("reverse_kl",), inputs={"number": torch.arange(ROWS)})
    assert calls == list(range(ROWS))


def test_what_a_piece_raises_is_raised_and_ends_the_others(three_threads, small_blocks):
    hidden, weight, _, other = models()
    calls = []

    def objective(stats):
        calls.append(1)
        if len(calls) == 3:
            raise KeyError("the third")
        return stats.reverse_kl

    given = (hidden, LMHead(weight), other, LMHead(weight.detach()), None)
    with pytest.raises(KeyError, match="the third"):
        linear_objective(*given, objective=objective, fields=("reverse_kl",))
    assert len(calls) == 3
    assert share(lambda part, turn: part.start, pieces(10, 2), hidden) == [0, 2, 4, 6, 8]  # the workers live on


def test_threads_that_others_start_have_what_they_had(three_threads):
    share(lambda part, turn: time.sleep(0.001), pieces(6, 1), torch.zeros(1))
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [3] and torch.get_num_threads() == 3
    alone = share(lambda part, turn: torch.get_num_threads(), pieces(6, 1), torch.zeros(1))
    assert alone == [1] * 6


def test_inference_mode_and_autograd_are_those_of_the_caller(three_threads):
    def modes(part, turn):
        return torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    with torch.inference_mode():
        assert set(share(modes, pieces(6, 1), torch.zeros(1))) == {(True, False)}
    assert set(share(modes, pieces(6, 1), torch.zeros(1))) == {(False, False)}
    hidden, weight, _, other = models(grad=False)
    with torch.inference_mode():
        inside = linear_divergence(hidden, LMHead(weight), other, LMHead(weight.flip(0)))
    assert inside.item() == pytest.approx(
        linear_divergence(hidden, LMHead(weight), other, LMHead(weight.flip(0))).item()
    )


def test_a_forked_process_has_workers_of_its_own(three_threads):
    share(lambda part, turn: None, pieces(6, 1), torch.zeros(1))
    child = os.fork()
    if child == 0:
        done = share(lambda part, turn: part.start, pieces(6, 1), torch.zeros(1)) == list(range(6))
        os._exit(0 if done else 1)
    deadline = time.monotonic() + 30
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if status[0] == 0:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert status == (child, 0)


def test_who_shares(three_threads, monkeypatch):
    here = threading.current_thread().name

    def name(part, turn):
        return threading.current_thread().name

    assert here not in share(name, pieces(6, 1), torch.zeros(1))
    assert share(name, [PART], torch.zeros(1)) == [here]
    assert set(share(name, pieces(6, 1), torch.zeros(1, device="meta"))) == {here}
    with torch._subclasses.FakeTensorMode():
        assert set(share(name, pieces(6, 1), torch.zeros(1))) == {here}
    assert [(part.start, part.stop) for part in even_pieces(13, torch.zeros(1))] == [
        (0, 3), (3, 6), (6, 9), (9, 12), (12, 13)]  # fmt: skip
    torch.set_num_threads(1)
    assert set(share(name, pieces(6, 1), torch.zeros(1))) == {here}
    assert even_pieces(13, torch.zeros(1)) == [slice(0, 13)]
    assert workers._pool.threads == 3


def test_ranks_that_share_the_ids_have_like_blocks_in_order_whatever_their_threads(three_threads, monkeypatch):
    """A collective in every block: another number of them, or another order, would leave ranks waiting for each other."""
    monkeypatch.setattr(rows_torch, "BLOCK_BYTES", 15 * VOCABULARY * 4)
    logits, seen = torch.zeros(ROWS, VOCABULARY), []
    for threads in (3, 1):
        torch.set_num_threads(threads)
        seen.append([])
        rows_torch.map_blocks(
            lambda block, turn: seen[-1].append((block.start, threading.current_thread().name)), logits, Ids()
        )
    here = threading.current_thread().name
    assert seen[0] == seen[1] == [(start, here) for start in range(0, ROWS, 15)]
