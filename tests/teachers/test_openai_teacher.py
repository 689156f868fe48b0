"""A teacher on servers as vLLM's: its rows are those of the same model here, cut to k ids; what cannot be learned from is refused."""

import contextlib
import json
import math
from dataclasses import replace

import pytest
import torch

from minillm import UserError
from minillm.config.models import ServedTeacherConfig
from minillm.engine.module import TermLoss
from minillm.methods.supervised import mixed_term
from minillm.models.batch import TokenSequence, collate
from minillm.models.tokenizers import byte_tokenizer
from minillm.rollout.scoring import batch_statistics
from minillm.serving.served_model import ServedModel
from minillm.teachers.openai_teacher import OpenAITeacher
from minillm.teachers.teacher import TopKRows
from tests.conftest import tiny_llama
from tests.serving.conftest import LiveServer
from tests.teachers.openai_server import FakeVllm, cut

# a text of one token each, one without an answer, and lengths that pad
TEXTS = [
    TokenSequence([5], [7]),
    TokenSequence([1, 2, 3, 4, 5, 6], [9, 8, 7, 256]),
    TokenSequence([11, 12], [], key=2),
    TokenSequence([30, 31], [100, 101, 102], key=3),
]
K = 5


@pytest.fixture
def models(make_models):
    return make_models()


@pytest.fixture
def fake(models):
    """A function that starts a server, of the teacher of `models` where no other is named."""
    with contextlib.ExitStack() as stack:

        def start(model=None, **options) -> FakeVllm:
            server = FakeVllm(models.teacher.model if model is None else model, **options)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def connect():
    """A function that makes the client of some servers."""
    with contextlib.ExitStack() as stack:

        def make(*servers, **keys) -> OpenAITeacher:
            keys = {"k": K, "tokenizer": "byte", "patience_seconds": 0.2} | keys
            urls = [one.url for one in servers]
            config = ServedTeacherConfig(type="served", protocol="openai", url=urls, **keys)
            teacher = OpenAITeacher(config, torch.device("cpu"), byte_tokenizer())
            stack.callback(teacher.close)
            return teacher

        yield make


def rows(teacher, texts=TEXTS):
    return teacher.rows(collate(texts, 0)).to("cpu").top_k


def test_rows_are_those_of_the_model_cut_to_each_tokens_own_id_and_the_likeliest_others(models, fake, connect):
    def likeliest(batch):
        with models.teacher.head() as head:
            return (models.teacher.rows(batch).hidden @ head.weight.T).topk(K).indices

    # beside the others, none of whose tokens is among the likeliest, two whose tokens are the first and the last of these
    best = likeliest(collate(TEXTS, 0))[0]
    texts = [*TEXTS, TokenSequence([5], [int(best[0])]), TokenSequence([5], [int(best[-1])])]
    found, batch = rows(connect(fake()), texts), collate(texts, models.pad_id)
    expected, among = cut(models.teacher, batch, K), likeliest(batch)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    assert (among == batch.labels[:, None]).any(1).tolist() == [False] * 8 + [True] * 2
    assert torch.equal(found.ids[:8, 1:], among[:8, :-1])
    assert torch.equal(found.ids[8:].sort(1).values, among[8:].sort(1).values)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_losses_are_those_of_the_local_teacher_cut_to_the_same_ids(models, fake, connect, divergence):
    def loss(teacher):
        term = mixed_term(TEXTS, replace(models, teacher=teacher), divergence=divergence, ce_ratio=0.25)
        models.student.zero_grad()
        value, _ = TermLoss(models.student, vocab_size=models.vocab_size, backend="torch")(term.to("cpu"))
        value.backward()
        return value.detach(), models.student.lm_head.weight.grad.clone()

    class Cut:
        """The local teacher, cut."""

        model, vocab_size = models.teacher.model, models.teacher.vocab_size

        def rows(self, batch):
            return TopKRows(cut(models.teacher, batch, K))

    ours, theirs, whole = loss(Cut()), loss(connect(fake())), loss(models.teacher)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
    assert 0 < theirs[0] < whole[0]


def test_the_log_probability_of_every_token_that_was_written_is_known(models, fake, connect):
    """Which methods need that weigh what the student has sampled: one that is not among the likeliest, too."""
    batch, teacher = collate(TEXTS, models.pad_id), connect(fake(), k=1)
    found = batch_statistics(models, batch, teacher.rows(batch), ("teacher_logprob",)).teacher_logprob
    expected = batch_statistics(models, batch, models.teacher.rows(batch), ("teacher_logprob",)).teacher_logprob
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_texts_are_asked_for_together_as_ids_and_undistorted(fake, connect):
    server = fake()
    rows(connect(server))
    asked = server.requests[-1]
    assert asked["prompt"] == [[5, 7], [1, 2, 3, 4, 5, 6, 9, 8, 7, 256], [30, 31, 100, 101, 102]]
    assert (asked["model"], asked["prompt_logprobs"], asked["max_tokens"]) == ("tiny", K, 1)
    neutral = {"temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0}
    assert neutral.items() <= asked.items()


def test_texts_without_answers_ask_for_nothing(fake, connect):
    server = fake()
    teacher, before = connect(server), len(server.requests)
    assert rows(teacher, [TEXTS[2]]).ids.shape == (0, K) and len(server.requests) == before


def test_ids_that_are_not_shared_are_left_to_the_tail_and_more_are_asked_for(models, fake, connect):
    """Of the 257 ids of the teacher the student knows 150."""
    server, texts = fake(), [TokenSequence([1, 2, 3], [9, 8, 7])]
    teacher = connect(server)
    teacher.shared_ids = 150
    found, expected = rows(teacher, texts), cut(models.teacher, collate(texts, 0), K, size=150)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)
    assert server.requests[-1]["prompt_logprobs"] > K
    teacher.shared_ids = 10
    with pytest.raises(UserError, match="max allowed: 20|unknown to the student"):
        rows(teacher, texts)


def test_impossible_ids_have_no_probability(models, fake, connect):
    model = tiny_llama(vocab_size=257, hidden_size=48, seed=1, tie=False)
    bias = torch.nn.Parameter(torch.zeros(257))
    model.lm_head.bias = bias
    with torch.no_grad():
        bias[7] = -torch.inf
    found = rows(connect(fake(model)), [TEXTS[0]])
    assert found.ids[0, 0] == 7 and found.logprobs[0, 0] == -math.inf


def changed(**changes):
    """An alteration of the first choice, of answers to more than the text by which a server is known."""

    def alter(said):
        if len(said["choices"]) > 1:
            said["choices"][0] |= changes
        return said

    return alter


def without_own(said):
    for choice in said["choices"][1:]:
        choice["prompt_logprobs"][-1] = {"3": {"logprob": -1.0}}
    return said


def not_numbers(said):
    for choice in said["choices"][1:]:
        next(iter(choice["prompt_logprobs"][-1].values()))["logprob"] = math.nan
    return said


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (changed(index=1), "has answered 3 of 3 texts"),
        (lambda said: {"choices": said["choices"][:1]}, "has answered 1 of 3 texts"),
        (
            lambda said: {"choices": said["choices"]} if len(said["choices"]) == 1 else {},
            "has answered none of 3 texts",
        ),
        (changed(prompt_logprobs=[None]), "has sent log-probabilities of 1 of 2 tokens"),
        (without_own, "no log-probabilities of a token, id 256"),
        (not_numbers, "no numbers"),
    ],
)
def test_answers_that_are_not_what_was_asked_for_are_refused(fake, connect, alter, words):
    teacher = connect(fake(alter=alter))
    with pytest.raises(UserError, match=words):
        rows(teacher)


def without_logprobs(said):
    return {
        "choices": [
            {name: one for name, one in choice.items() if name != "prompt_logprobs"} for choice in said["choices"]
        ]
    }


def logits(said):
    for place in said["choices"][0]["prompt_logprobs"][1:]:
        for one in place.values():
            one["logprob"] += 9.0
    return said


def fewer(said):
    for choice in said["choices"]:
        for place in choice["prompt_logprobs"][1:]:
            for token in list(place)[3:]:
                del place[token]
    return said


@pytest.mark.parametrize(
    ("options", "keys", "words"),
    [
        ({"alter": without_logprobs}, {}, "without log-probabilities of the text.*llama.cpp"),
        ({"alter": logits}, {}, "are no log-probabilities.*--logprobs-mode raw_logprobs"),
        ({"alter": fewer}, {}, r"sends 3 ids a token, and teacher.k is 5"),
        ({"most": 4}, {}, r"max allowed: 4; start the server with --max-logprobs 5, or ask for fewer ids"),
        ({}, {"model": "other"}, "serves tiny, and teacher.model is other"),
        ({"names": ("one", "two")}, {}, "serves one, two: say in teacher.model which"),
        ({"names": ()}, {}, "serves no model"),
        ({"token": "secret"}, {}, "refuses this client.*set teacher.token_env"),
    ],
)
def test_servers_that_nothing_can_be_learned_from_are_refused_at_once(fake, connect, options, keys, words):
    with pytest.raises(UserError, match=words):
        connect(fake(**options), **keys)


def test_a_server_of_minillm_is_another_kind(make_models, connect):
    models = make_models()
    server = LiveServer(ServedModel("tiny", models.teacher.model, models.tokenizer))
    with pytest.raises(UserError, match="status 404"):
        connect(server)
    server.stop()


def test_a_model_may_be_named_as_the_server_was_started_with_it(fake, connect, monkeypatch):
    monkeypatch.setenv("KEY", "secret")
    teacher = connect(fake(token="secret"), model="/models/root", token_env="KEY")
    assert teacher.described["model"] == "tiny" and len(rows(teacher).ids) == 8


def test_texts_longer_than_the_servers_read_are_refused(fake, connect):
    server = fake(longest=12)
    teacher = connect(server)
    teacher.require_length("data.prompts", 11)
    with pytest.raises(UserError, match=r"data.prompts: a text may have 12 tokens, .* --max-model-len 13"):
        teacher.require_length("data.prompts", 12)
    assert len(rows(teacher, [TokenSequence([1], list(range(10)))]).ids) == 10  # and eleven are read
    with pytest.raises(UserError, match="maximum context length is 12"):
        rows(teacher, [TokenSequence([1], list(range(11)))])


def test_two_servers_share_the_work_and_one_takes_over(fake, connect):
    servers = [fake(), fake()]
    teacher = connect(*servers, patience_seconds=5.0)
    expected = rows(teacher)
    promised = [teacher.rows(collate(TEXTS, 0)) for _ in range(6)]
    assert all(torch.equal(one.to("cpu").top_k.ids, expected.ids) for one in promised)
    assert min(len(one.requests) for one in servers) > 1
    servers[0].stop()
    assert torch.equal(rows(teacher).ids, expected.ids)


def test_the_same_weights_in_fewer_bits_are_the_same_model_and_others_are_not(models, fake, connect):
    rounded = tiny_llama(vocab_size=257, hidden_size=48, seed=1).bfloat16()
    other = tiny_llama(vocab_size=257, hidden_size=48, seed=7)
    first = connect(fake())
    assert first.difference(json.loads(json.dumps(connect(fake(rounded)).identity))) is None
    assert "nats a token" in first.difference(connect(fake(other)).identity)
    teacher = connect(fake(), fake(other))
    promised = [teacher.rows(collate(TEXTS, 0)) for _ in range(4)]
    with pytest.raises(UserError, match="serves other weights than tiny.*differs by .* nats a token"):
        for one in promised:
            one.wait()


def test_a_server_that_comes_back_with_other_weights_is_refused(fake, connect):
    server = fake()
    teacher = connect(server, patience_seconds=30.0)
    rows(teacher)
    server.stop()
    promised = teacher.rows(collate(TEXTS, 0))
    while not server_is_missed(teacher):
        pass
    server.model = tiny_llama(vocab_size=257, hidden_size=48, seed=7)
    server.start()
    with pytest.raises(UserError, match="serves other weights than tiny"):
        promised.wait()


def server_is_missed(teacher) -> bool:
    return teacher.pool.servers[0].failures > 0
