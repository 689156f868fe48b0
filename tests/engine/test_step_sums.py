"""What a step reports: means over the rows of its own term, whichever micro-batch or rank they lay in."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from minillm.engine.step_sums import StepSums, divisors, losses, step_result
from minillm.methods.protocol import Term
from minillm.models.batch import TokenSequence, collate


def term(name: str, tokens: int, *, count: float) -> Term:
    batch = collate([TokenSequence([5], [6] * tokens)], pad_id=0)
    return Term(name, batch, lambda stats: stats.student_logprob, ("student_logprob",), count)


def sums_of(*added) -> dict[str, float]:
    """The numbers of one rank: (term, loss, metrics) each."""
    sums = StepSums(torch.device("cpu"))
    for one, loss, metrics in added:
        sums.add(one, torch.tensor(loss), {name: torch.tensor(value) for name, value in metrics.items()})
    return sums.numbers()


POLICY, LONGER, TEXT = term("policy", 2, count=1.0), term("policy", 3, count=1.0), term("pretraining", 4, count=4.0)
ADDED = (
    (POLICY, 0.5, {"entropy_nats": 3.0}),
    (LONGER, 0.25, {"entropy_nats": 4.5}),
    (TEXT, 0.125, {"cross_entropy_nats": 10.0}),
)


def test_a_metric_is_the_mean_over_its_own_terms_rows():
    result = step_result(sums_of(*ADDED), grad_norm=2.0, learning_rate=0.1)
    assert result.metrics == {
        "loss": 0.875,
        "loss/policy": 0.75,
        "loss/pretraining": 0.125,
        "grad_norm": 2.0,
        "learning_rate": pytest.approx(0.1),
        "entropy_nats": 1.5,  # 7.5 nats over 5 rows of "policy", not over all 9, not over 2 micro-batches
        "cross_entropy_nats": 2.5,
    }
    assert result.rows == 9


def test_what_trains_another_model_is_not_counted_as_the_students():
    anchor = replace(term("anchor", 5, count=5.0), trains="teacher")
    result = step_result(sums_of(*ADDED, (anchor, 1.0, {"drift_nats": 2.5})), grad_norm=0.0, learning_rate=0.0)
    assert result.rows == 9 and result.metrics["drift_nats"] == 0.5


def test_sums_of_ranks_give_the_numbers_of_one_process():
    together = step_result(sums_of(*ADDED), grad_norm=0.0, learning_rate=0.0)
    ranks = Counter(sums_of(ADDED[0], ADDED[2]))
    ranks.update(sums_of(ADDED[1]))
    assert step_result(dict(ranks), grad_norm=0.0, learning_rate=0.0) == together


def test_a_term_without_rows_reports_no_number_by_division():
    numbers = {"loss": 0.0, "loss/policy": 0.0, ":policy": 0, "policy:entropy_nats": 0.0}
    result = step_result(numbers, grad_norm=0.0, learning_rate=0.0)
    assert result.metrics["entropy_nats"] == 0.0 and result.rows == 0


def test_losses_are_the_numbers_that_are_no_metric_and_no_count():
    assert losses(sums_of(*ADDED)) == {"loss": 0.875, "loss/policy": 0.75, "loss/pretraining": 0.125}


def test_divisors_add_up_by_name():
    assert divisors([POLICY, LONGER, TEXT]) == {"policy": 2.0, "pretraining": 4.0}


def test_sums_keep_no_graph():
    sums, loss = StepSums(torch.device("cpu")), torch.tensor(1.0, requires_grad=True)
    for one in (POLICY, LONGER):
        sums.add(one, loss * 2, {})
    assert not any(value.requires_grad for value in sums._sums.values())
