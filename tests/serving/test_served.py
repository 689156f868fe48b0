"""A served teacher says what the same model says here: rows, head, likeliest ids, answers, and every loss made of them."""

import re
import threading
import time
from dataclasses import replace

import pytest
import torch

from minillm import UserError
from minillm.engine.module import TermLoss
from minillm.methods.supervised import mixed_term
from minillm.models.batch import TokenSequence, collate
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.serving.app import Limits
from minillm.serving.served_model import ServedModel
from minillm.teachers.local import LocalTeacher
from minillm.teachers.row_storage import likeliest
from minillm.teachers.server_pool import TeacherAway
from tests.conftest import tiny_llama

# a text of one token each, one without an answer, and lengths that pad
TEXTS = [
    TokenSequence([5], [7]),
    TokenSequence([1, 2, 3, 4, 5, 6], [9, 8, 7, 256]),
    TokenSequence([11, 12], [], key=2),
    TokenSequence([30, 31], [100, 101, 102], key=3),
]


@pytest.fixture
def models(make_models):
    return make_models()


@pytest.fixture
def served(models, served_model, live, connect):
    """The pair with its teacher behind HTTP."""
    return replace(models, teacher=connect(live(served_model)))


def losses(models, divergence: str, options=None):
    """The loss of a term and the gradient of the student's head."""
    term = mixed_term(TEXTS, models, divergence=divergence, ce_ratio=0.25, options=options)
    models.student.zero_grad()
    loss, _ = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")(term.to("cpu"))
    loss.backward()
    return loss.detach(), models.student.lm_head.weight.grad.clone()


@pytest.mark.parametrize(
    ("divergence", "options"),
    [("forward_kl", None), ("reverse_kl", None), ("jsd", {"beta": 0.3}), ("skew_forward_kl", {"alpha": 0.1})],
)
def test_losses_are_the_local_teachers_bit_for_bit_in_fp32(models, served, divergence, options):
    ours, theirs = losses(models, divergence, options), losses(served, divergence, options)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    assert ours[0] > 0


def test_rows_in_bf16_are_the_local_teachers_to_rounding(models, live, connect):
    model = tiny_llama(vocab_size=257, hidden_size=48, seed=1).bfloat16()
    teacher = connect(live(ServedModel("tiny", model, models.tokenizer)))
    batch = collate(TEXTS, models.pad_id)
    here, there = LocalTeacher(model).rows(batch).hidden, teacher.rows(batch).to("cpu").hidden
    assert there.dtype == torch.bfloat16
    torch.testing.assert_close(there, here, rtol=2**-7, atol=2**-7)
    with teacher.head() as head:
        assert head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("texts", [TEXTS, TEXTS[-1:]])
def test_what_stands_beside_shorter_texts_is_the_batchs_own(served, texts):
    """Of a batch whose texts are of one length too, since a server reads it beside others."""
    assert dict(served.teacher._asked_of(collate(texts, 77)).query)["pad_id"] == "77"


def test_the_head_and_the_names_are_those_of_the_model(models, served):
    with models.teacher.head() as ours, served.teacher.head() as theirs:
        assert torch.equal(ours.weight, theirs.weight) and theirs.bias is None
    assert served.teacher.vocab_size == models.teacher.vocab_size == 257
    assert served.teacher.end_ids == (256, 0)


def test_likeliest_ids_are_among_the_shared_ones(models, served_model, live, connect):
    teacher = connect(live(served_model), rows="top_k", k=5)
    teacher.shared_ids = 200
    batch = collate(TEXTS, models.pad_id)
    top_k = teacher.rows(batch).to("cpu").top_k
    with models.teacher.head() as head:
        hidden = models.teacher.rows(batch).hidden
        ids, logprobs = likeliest(hidden, replace(head, weight=head.weight[:200]), 5, batch.labels)
    assert torch.equal(top_k.ids, ids) and torch.equal(top_k.logprobs, logprobs)
    assert int(top_k.ids.max()) < 200
    known = (top_k.ids == batch.labels[:, None]).any(1)
    assert torch.equal(known, batch.labels < 200), "the text's own tokens are there"
    assert teacher.abilities == {"read", "sample", "answer", "single"}
    with pytest.raises(UserError, match="top_k"), teacher.head():
        pass


@pytest.mark.parametrize("sampling", [Sampling(6), Sampling(6, temperature=0.0), Sampling(6, top_k=4, top_p=0.9)])
def test_answers_are_those_of_the_same_model_here(models, served, sampling):
    prompts, keys = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]], [3, 1, 4, 1, 5]
    asked = {"keys": keys, "seed": 9, "draw": 2, "who": "teacher", "batch_size": 2}
    heard = []
    # in the batches that are asked for: a product of fewer rows rounds otherwise
    ours = LocalRollouts(models, refill=False).sample(prompts, sampling, **asked)
    theirs = LocalRollouts(served).sample(prompts, sampling, **asked, progress=heard.append)
    for one, other in zip(ours, theirs, strict=True):
        assert (one.prompt, one.response, one.ended) == (other.prompt, other.response, other.ended)
        assert torch.equal(one.logprobs, other.logprobs)
    assert heard == [2, 4, 5]


def test_a_mixture_with_the_student_is_refused_by_name(served):
    with pytest.raises(UserError, match="be mixed with the student token by token"):
        LocalRollouts(served).sample([[1]], Sampling(2, alpha=0.5), keys=[0], seed=0, who="mixture", batch_size=1)


def test_pictures_are_refused(served):
    batch = collate([replace(TEXTS[0], extras={"pixel_values": torch.zeros(1, 2)})], 0)
    with pytest.raises(UserError, match="texts alone"):
        served.teacher.rows(batch)


def test_requests_go_to_all_servers(models, served_model, live, connect):
    """Rows are asked for together and waited for one by one; each is the right one, whoever gave it."""
    servers = [live(served_model), live(served_model)]
    teacher = connect(*servers)
    batches = [collate([TokenSequence([one, 1], [2, 3, one])], 0) for one in range(40)]
    promised = [teacher.rows(batch) for batch in batches]
    for batch, rows in zip(batches, promised, strict=True):
        here, there = models.teacher.rows(batch).hidden, rows.to("cpu").hidden
        assert len(rows) == 3 and torch.equal(here, there)
    counts = [one.server.config.app.state.metrics.text(waiting=0) for one in servers]
    assert all('path="/rows",status="200"' in text for text in counts)


def test_a_server_that_dies_and_returns(models, served_model, live, connect):
    server = live(served_model)
    teacher = connect(server, patience_seconds=30.0)
    batch = collate(TEXTS, 0)
    first = teacher.rows(batch).to("cpu").hidden
    server.stop()
    promised = teacher.rows(batch)
    assert not promised.promised.done()
    server.start()
    assert torch.equal(promised.to("cpu").hidden, first)


def test_the_other_server_takes_over(served_model, live, connect):
    servers = [live(served_model), live(served_model)]
    teacher = connect(*servers, patience_seconds=0.0)
    servers[0].stop()
    for _ in range(4):
        assert len(teacher.rows(collate(TEXTS, 0)).to("cpu")) == 8


def test_servers_that_stay_away_are_an_error_with_their_names(served_model, live, connect):
    server = live(served_model)
    teacher = connect(server, patience_seconds=0.2)
    server.stop()
    with pytest.raises(
        TeacherAway, match=rf"no server of the teacher has answered for 0.2 s \({server.url}: .*refused"
    ):
        teacher.rows(collate(TEXTS, 0)).to("cpu")


def test_a_server_that_returns_with_other_weights_is_refused_by_name(served_model, other_model, live, connect):
    server = live(served_model)
    teacher = connect(server)
    server.stop()
    server.served = other_model
    server.start()
    with pytest.raises(UserError, match=f"{server.url} serves other weights than tiny"):
        teacher.rows(collate(TEXTS, 0)).to("cpu")


def test_two_servers_with_different_models_are_refused(served_model, other_model, live, connect):
    teacher = connect(live(served_model), live(other_model))
    promised = [teacher.rows(collate(TEXTS, 0)) for _ in range(4)]
    with pytest.raises(UserError, match="serves other weights than"):
        for one in promised:
            one.wait()


def test_another_model_than_the_configured_one_is_refused_by_name(served_model, live, connect):
    server = live(served_model)
    connect(server, model="tiny")
    with pytest.raises(UserError, match="serves tiny, and teacher.model is Qwen/Qwen3-8B"):
        connect(server, model="Qwen/Qwen3-8B")


def test_a_token_is_sent_and_asked_for(served_model, live, connect, monkeypatch):
    server = live(served_model, token="secret")
    with pytest.raises(UserError, match="refuses this client.*set teacher.token_env"):
        connect(server)
    with pytest.raises(UserError, match="TEACHER_TOKEN is not set"):
        connect(server, token_env="TEACHER_TOKEN")
    monkeypatch.setenv("TEACHER_TOKEN", "wrong")
    with pytest.raises(UserError, match="TEACHER_TOKEN holds another token"):
        connect(server, token_env="TEACHER_TOKEN")
    monkeypatch.setenv("TEACHER_TOKEN", "secret")
    assert len(connect(server, token_env="TEACHER_TOKEN").rows(collate(TEXTS, 0)).to("cpu")) == 8


def test_what_the_server_refuses_is_said_in_its_words(served, models):
    with pytest.raises(UserError, match="a text holds id 300, and the model has the ids 0 to 256"):
        served.teacher.rows(collate([TokenSequence([1], [300])], 0)).wait()


def test_a_full_server_is_given_the_time_it_asks_for(models, served_model, live, connect):
    server = live(served_model, Limits(queue_size=1))
    teachers, go_on = [connect(server, patience_seconds=0.0) for _ in range(2)], threading.Event()
    worker = server.server.config.app.state.worker
    rows, worker.answer_rows = worker.answer_rows, lambda requests: go_on.wait(30) and rows(requests)
    batches = [collate([TokenSequence([one, 1], [2, 3])], 0) for one in range(4)]  # two at a time from each client
    promised = [teachers[place % 2].rows(batch) for place, batch in enumerate(batches)]
    refused = re.compile(r'minillm_requests_total{path="/rows",status="429"} (\d+)')
    while sum(int(times) for times in refused.findall(worker.metrics.text(waiting=0))) < 8:  # some more than once
        time.sleep(0.01)
    go_on.set()
    for batch, one in zip(batches, promised, strict=True):
        assert torch.equal(one.to("cpu").hidden, models.teacher.rows(batch).hidden)
