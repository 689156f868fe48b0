"""The term that methods on fixed responses share: its loss, its weight, and each metric that it reports."""

import pytest
import torch

from minillm import UserError
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.methods.protocol import TrainingData
from minillm.methods.supervised import mixed_term, take_references
from minillm.models.batch import TokenSequence
from minillm.rollout.local.local_rollouts import LocalRollouts

# of unequal length: padding or a mean over sequences would give another number
ITEMS = [TokenSequence([60, 61], [90, 91, 92]), TokenSequence([70], [80])]


@pytest.fixture
def models(make_models):
    return make_models()


def log_probs(model):  # -> (N, V) float64
    return torch.cat(
        [
            model(torch.tensor([one.prompt + one.response])).logits[0, len(one.prompt) - 1 : -1].detach().double()
            for one in ITEMS
        ]
    ).log_softmax(-1)


@pytest.mark.parametrize("ce_ratio", [0.0, 0.25, 1.0])
def test_loss_and_metrics_are_those_of_full_logits(ce_ratio, models):
    term = mixed_term(ITEMS, models, divergence="reverse_kl", ce_ratio=ce_ratio, name="imitation", weight=0.5)
    loss, metrics = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")(term)
    log_q, log_p = log_probs(models.student), log_probs(models.teacher.model)
    labels = torch.tensor([token for one in ITEMS for token in one.response])
    cross_entropy = -log_q.gather(1, labels[:, None]).sum().item()
    reverse_kl = (log_q.exp() * (log_q - log_p)).sum().item()
    assert (term.name, term.weight, term.count) == ("imitation", 0.5, 4.0)
    assert loss.item() == pytest.approx(ce_ratio * cross_entropy + (1 - ce_ratio) * reverse_kl, rel=1e-5)
    want = {"reverse_kl_nats": reverse_kl} if ce_ratio < 1 else {}
    want |= {"cross_entropy_nats": cross_entropy} if ce_ratio > 0 else {}
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(want, rel=1e-5)
    assert not any(value.requires_grad for value in metrics.values())


def test_cross_entropy_alone_asks_no_teacher(make_models):
    models = make_models(teacher=False)
    term = mixed_term(ITEMS, models, divergence="forward_kl", ce_ratio=1.0)
    assert term.teacher is None and term.fields == ("student_logprob",) and term.name == "distillation"
    with pytest.raises(UserError, match="the term 'distillation'"):
        mixed_term(ITEMS, models, divergence="forward_kl", ce_ratio=0.5)


def test_references_are_taken_in_the_order_of_the_stream(models, tmp_path):
    examples = [Example(number, [60 + number], [90 + number], "", ()) for number in range(5)]
    data = TrainingData(Stream(examples, seed=1), None, LocalRollouts(models), tmp_path)
    expected = Stream(examples, seed=1).take(5)
    taken = take_references(data, 2) + take_references(data, 3)
    assert [(one.prompt, one.response, one.key) for one in taken] == [
        (one.prompt_ids, one.response_ids, one.index) for one in expected
    ]
