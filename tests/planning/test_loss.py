"""The loss twin holds what the real loss holds on a CPU."""

import pytest
import torch

from minillm.kernels.group_distance import Matches, Side, linear_group_distance
from minillm.kernels.sorted_distance import linear_sorted_distance
from minillm.losses import LMHead, linear_objective
from minillm.methods.standardized import standardized_divergence
from minillm.planning.ledger import Ledger
from minillm.planning.loss import LossShape, LossTwin, sorting_shape, standardized_twin

ROWS, HIDDEN, VOCAB = 700, 48, 40000


def reverse_kl(stats):
    return stats.reverse_kl


def cross_entropy(stats):
    return -stats.student_logprob


@pytest.mark.parametrize(("models", "objective"), [(1, cross_entropy), (2, reverse_kl)])
def test_the_twin_holds_what_the_loss_holds(models, objective):
    labels = torch.zeros(ROWS, dtype=torch.int64)
    fields = ("reverse_kl",) if models == 2 else ("student_logprob",)
    peaks = []
    for twin in (False, True):
        with Ledger() as ledger:
            teacher = (torch.randn(ROWS, HIDDEN), torch.randn(VOCAB, HIDDEN)) if models == 2 else (None, None)
            hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
            weight = torch.randn(VOCAB, HIDDEN, requires_grad=True)
            given = ledger.total
            ledger.take()
            if twin:
                shape = LossShape(ROWS, VOCAB, models, torch.device("cpu"))
                loss = LossTwin.apply(hidden, weight, torch.float32, shape, ledger)
            else:
                loss, _ = linear_objective(hidden, weight, *teacher, labels, objective, fields=fields)
            forward = ledger.take().peak({}, {})
            loss.backward()
            backward = ledger.take().peak({}, {})
        peaks.append((sum(forward.values()) - given, sum(backward.values()) - given))
    real, ours = peaks
    assert ours[0] == pytest.approx(real[0], rel=0.1)
    assert ours[1] == pytest.approx(real[1], rel=0.01)


def test_the_chunk_is_that_of_the_kernels_on_a_gpu():
    shape = LossShape(8192, 151936, 2, torch.device("cuda"))
    assert shape.chunk == 1024  # 1.25 GiB of fp32 logits of both models, evened out
    assert shape.logits_bytes == 2 * 1024 * 151936 * 4
    assert shape.full_logits_bytes(gradient=True) == 5 * 8192 * 151936 * 4


def test_the_twin_of_standardised_logits_holds_what_the_divergence_holds():
    peaks = []
    for twin in (False, True):
        with Ledger() as ledger:
            theirs = torch.randn(ROWS, HIDDEN), LMHead(torch.randn(VOCAB, HIDDEN))
            hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
            head = LMHead(torch.randn(VOCAB, HIDDEN, requires_grad=True))
            given = ledger.total
            ledger.take()
            if twin:
                shape = LossShape(ROWS, VOCAB, 2, torch.device("cpu"))
                loss = standardized_twin(hidden, head, *theirs, torch.float32, shape, ledger)
            else:
                loss, _ = standardized_divergence(
                    hidden, head, *theirs, weights=torch.ones(ROWS), answers=torch.ones(ROWS, dtype=torch.bool),
                    divergence="reverse_kl", vocab_size=VOCAB, options={},
                )  # fmt: skip
            forward = ledger.take().peak({}, {})
            loss.backward()
            backward = ledger.take().peak({}, {})
        peaks.append((sum(forward.values()) - given, sum(backward.values()) - given))
    real, ours = peaks
    assert ours == pytest.approx(real, rel=0.05)


def sort(hidden, head, teacher_hidden, teacher_head):
    linear_sorted_distance(hidden, head, teacher_hidden, teacher_head)


def group(hidden, head, teacher_hidden, teacher_head):
    """All rows are groups of one token; half of them have ids that match."""
    none, rows, ids = torch.empty(0, dtype=torch.int64), torch.arange(ROWS), torch.arange(len(teacher_head.weight))
    sides = (
        Side(states, weights, rows, torch.zeros_like(rows), none, none, none)
        for states, weights in ((hidden, head), (teacher_hidden, teacher_head))
    )
    linear_group_distance(*sides, Matches(ids, ids, rows % 2 == 0))


@pytest.mark.parametrize(("compare", "least"), [(sort, 0.8), (group, 0.5)])
def test_sorting_holds_no_more_than_its_twin(compare, least):
    """A budget: what a sort takes beside its results differs from torch to torch."""
    peaks, ids, teacher_ids = [], 10000, 7500
    for twin in (False, True):
        with Ledger() as ledger:
            theirs = torch.randn(ROWS, HIDDEN), LMHead(torch.randn(teacher_ids, HIDDEN))
            hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
            weight = torch.randn(ids, HIDDEN, requires_grad=True)
            given = ledger.total
            ledger.take()
            if twin:
                shape = sorting_shape(ROWS, ids, teacher_ids, torch.device("cpu"))
                LossTwin.apply(hidden, weight, torch.float32, shape, ledger)
            else:
                compare(hidden, LMHead(weight), *theirs)
            peaks.append(sum(ledger.take().peak({}, {}).values()) - given)
    real, planned = peaks
    assert least * planned < real <= 1.02 * planned, peaks
