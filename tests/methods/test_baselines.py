"""sft, kd, gkd and seqkd against eager losses on full logits."""

import pytest
import torch
import torch.nn.functional as F

from minillm.config.root import StageConfig
from minillm.data.instructions import Example
from minillm.data.stream import Stream
from minillm.engine.module import TermLoss
from minillm.methods import build_method
from minillm.methods.protocol import TrainingData
from minillm.rollout.local.local_rollouts import LocalRollouts
from tests.methods.conftest import stage_of

EXAMPLES = [Example(i, [60 + i, 70][: 1 + i % 2], [90 + i, 91, 256][: 2 + i % 2], "", ()) for i in range(8)]


def stage(**method) -> StageConfig:
    return stage_of(4, rollout={"batch_size": 3, "max_new_tokens": 5}, **method)


@pytest.fixture
def data(models, tmp_path):
    return TrainingData(Stream(EXAMPLES, seed=1), None, LocalRollouts(models), tmp_path / "written")


def loss_of(term, models):
    loss, _ = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")(term)
    return loss / term.count


def rows(models, items):
    """(log q, log p, labels) over all response positions, (N, V), (N, V) and (N,)."""
    log_q, log_p, labels = [], [], []
    for item in items:
        ids, first = torch.tensor([item.prompt + item.response]), len(item.prompt) - 1
        log_q.append(models.student(ids).logits[0, first:-1].log_softmax(-1))
        log_p.append(models.teacher.model(ids).logits[0, first:-1].log_softmax(-1))
        labels += item.response
    return torch.cat(log_q), torch.cat(log_p), torch.tensor(labels)


def eager(name, log_q, log_p):
    q, p = log_q.exp(), log_p.exp()
    if name == "forward_kl":
        return (p * (log_p - log_q)).sum(-1).mean()
    if name == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1).mean()
    if name == "skew_forward_kl":
        return (p * (log_p - (0.3 * p + 0.7 * q).log())).sum(-1).mean()
    m = (0.3 * p + 0.7 * q).log()
    return (0.3 * p * (log_p - m) + 0.7 * q * (log_q - m)).sum(-1).mean()


@pytest.mark.parametrize(
    "method, divergence, ce_ratio",
    [
        ({"name": "sft"}, None, 1.0),
        ({"name": "kd"}, "forward_kl", 0.5),
        ({"name": "kd", "divergence": "reverse_kl", "ce_ratio": 0.0}, "reverse_kl", 0.0),
        ({"name": "kd", "divergence": "jsd", "beta": 0.3, "ce_ratio": 0.25}, "jsd", 0.25),
        ({"name": "kd", "divergence": "skew_forward_kl", "skew": 0.3, "ce_ratio": 0.0}, "skew_forward_kl", 0.0),
        ({"name": "gkd", "on_policy": 0.0, "beta": 0.3}, "jsd", 0.0),
        ({"name": "gkd", "on_policy": 1.0, "beta": 0.0}, "forward_kl", 0.0),
        ({"name": "gkd", "on_policy": 1.0, "beta": 1.0}, "reverse_kl", 0.0),
        ({"name": "seqkd"}, None, 1.0),
        ({"name": "seqkd", "kd_ratio": 0.5}, "forward_kl", 0.5),
    ],
    ids=str,
)
def test_the_loss_is_the_eager_one(method, divergence, ce_ratio, models, data):
    built = build_method(stage(**method))
    items = built.collect(data, models, draw=0)
    (term,) = built.terms(items, data, models)
    log_q, log_p, labels = rows(models, items)
    want = ce_ratio * F.nll_loss(log_q, labels)
    if divergence:
        want = want + (1 - ce_ratio) * eager(divergence, log_q, log_p)
    torch.testing.assert_close(loss_of(term, models), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method, term", [("sft", "supervised"), ("kd", "distillation"), ("seqkd", "distillation")])
def test_records_name_the_loss_by_its_term(method, term, models, data):
    built = build_method(stage(name=method))
    (one,) = built.terms(built.collect(data, models, draw=0), data, models)
    assert one.name == term and one.weight == 1.0


def test_gkd_trains_on_samples_of_the_student_or_on_references(models, data):
    references = {example.index: example.response_ids for example in EXAMPLES}
    off = build_method(stage(name="gkd", on_policy=0.0)).collect(data, models, draw=0)
    assert all(item.response == references[item.key] for item in off)
    on = build_method(stage(name="gkd", on_policy=1.0)).collect(data, models, draw=0)
    assert any(item.response != references[item.key] for item in on)
    half = build_method(stage(name="gkd", on_policy=0.5))
    chose_references = [
        all(item.response == references[item.key] for item in half.collect(data, models, draw)) for draw in range(12)
    ]
    assert 0 < sum(chose_references) < 12


def test_seqkd_imitates_what_the_teacher_wrote_once(models, data, monkeypatch):
    method = build_method(stage(name="seqkd", temperature=0.0))
    first = method.collect(data, models, draw=0)
    for item in first:
        ids = torch.tensor([item.prompt])
        assert item.response[0] == int(models.teacher.model(ids).logits[0, -1].argmax())
    monkeypatch.setattr(LocalRollouts, "sample", lambda *args, **kwargs: pytest.fail("written again"))
    again = build_method(stage(name="seqkd", temperature=0.0)).collect(data, models, draw=1)
    written = {item.key: item.response for item in first}
    assert all(written.get(item.key, item.response) == item.response for item in again)
