"""The HTTP side: who may ask, how much, what is counted, and what is told to whoever asks for something that is not there."""

import json
import threading
import time

import pytest
import urllib3

from minillm.models.batch import TokenSequence
from minillm.serving.app import Limits
from minillm.teachers.wire import JSON, SAFETENSORS, RowsRequest, unpack

ASKED = {"prompts": [[1, 2, 3]], "responses": [[4, 5]]}


def ask(server, path, body=None, *, method=None, **headers):
    """(status, JSON or bytes, headers) of one request."""
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    headers = {"content-type": JSON, **{name.replace("_", "-"): value for name, value in headers.items()}}
    method = method or ("GET" if body is None else "POST")
    answer = urllib3.PoolManager(retries=False).request(method, server.url + path, body=body, headers=headers)
    said = json.loads(answer.data) if answer.headers.get("content-type") == JSON else answer.data
    return answer.status, said, answer.headers


def count(server, name: str) -> float:
    """A number of /metrics, with its labels."""
    status, text, _ = ask(server, "/metrics")
    assert status == 200
    return float(next(line.split()[1] for line in text.decode().splitlines() if line.split()[0] == name))


def test_json_and_safetensors_ask_the_same(served_model, live):
    server = live(served_model)
    request = RowsRequest((TokenSequence([1, 2, 3], [4, 5]),))
    answers = [ask(server, "/rows", ASKED), ask(server, "/rows", request.body, content_type=SAFETENSORS)]
    assert [status for status, _, _ in answers] == [200, 200] and answers[0][1] == answers[1][1]
    assert unpack(answers[0][1])["hidden"].shape == (2, 48)
    assert answers[0][2]["x-minillm-model"] == served_model.fingerprint


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/rows", b"{", "expected JSON"),
        ("/rows", {"prompts": [[1]]}, 'expected {"prompts"'),
        ("/rows", {"prompts": [[1]], "responses": []}, "1 prompts and 0 responses"),
        ("/rows", {"prompts": [[True]], "responses": [[1]]}, 'expected {"prompts"'),
        ("/rows", {"prompts": [[]], "responses": [[1]]}, "a prompt has no tokens"),
        ("/rows", {"prompts": [[-1]], "responses": [[1]]}, "a text holds id -1"),
        ("/rows?rows=logits", ASKED, "expected hidden or top_k"),
        ("/rows?rows=top_k", ASKED, "needs k"),
        ("/rows?rows=top_k&k=300", ASKED, "k is 300, and the model has 257 ids"),
        ("/rows?pad_id=x", ASKED, "pad_id is 'x'"),
        ("/sample", {"prompts": [[1]]}, "expected the entries"),
    ],
)
def test_what_cannot_be_answered_is_said(served_model, live, path, body, said):
    status, found, _ = ask(live(served_model), path, body)
    assert status == 400 and said in found["error"]


@pytest.mark.parametrize("body", [b"", b"\xff" * 64, RowsRequest(()).body[:-1]])
def test_damaged_safetensors_are_refused(served_model, live, body):
    status, found, _ = ask(live(served_model), "/rows", body, method="POST", content_type=SAFETENSORS)
    assert status == 400 and "safetensors" in found["error"]


SAMPLE = {"prompts": [[1]], "keys": [0], "seed": 1, "draw": 0, "sampling": {"max_new_tokens": 2},
          "eos_ids": [256], "pad_id": 0, "vocab_size": 257}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keys": []}, "1 prompts and 0 keys"),
        ({"vocab_size": 999}, "vocab_size is 999"),
        ({"sampling": {"max_new_tokens": 2.5}}, "must be whole numbers"),
        ({"sampling": {"max_new_tokens": 2, "alpha": 0.5}}, "there is one model here"),
        ({"sampling": {"length": 2}}, "sampling: "),
        ({"sampling": {"max_new_tokens": 0}}, "at least 1"),
        ({"prompts": [["a"]]}, "must be lists of ids"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused(served_model, live, change, said):
    status, found, _ = ask(live(served_model), "/sample", SAMPLE | change)
    assert status == 400 and said in found["error"]


def test_a_token_is_asked_for_everywhere_but_at_health(served_model, live):
    server = live(served_model, token="secret")
    assert ask(server, "/health")[:2] == (200, {"status": "ok"})
    for path in ("/model", "/tokenizer", "/head", "/metrics"):
        assert ask(server, path)[0] == 401
    for given in ("secret", "Bearer wrong", "Bearer secretx", "Bearer "):
        assert ask(server, "/rows", ASKED, authorization=given)[0] == 401
    assert ask(server, "/rows", ASKED, authorization="Bearer secret")[0] == 200


def test_large_requests_are_refused(served_model, live):
    server = live(served_model, Limits(request_bytes=200, request_tokens=12))
    status, found, _ = ask(server, "/rows", {"prompts": [[1] * 200], "responses": [[1]]})
    assert status == 413 and "at most 200 bytes" in found["error"]
    three = {"prompts": [[1, 2, 3]] * 3, "responses": [[4, 5], [6], [7]]}  # padded to 4 positions each: twelve
    assert ask(server, "/rows", three)[0] == 200
    status, found, _ = ask(server, "/rows", {name: [*texts, texts[-1]] for name, texts in three.items()})
    assert status == 413 and "16 positions, padded" in found["error"]
    status, found, _ = ask(server, "/rows", (json.dumps(ASKED).encode() for _ in range(9)), method="POST")
    assert status == 413  # in chunks, without a length


def test_a_full_queue_says_when_to_come_again(served_model, live):
    server, go_on = live(served_model, Limits(queue_size=1)), threading.Event()
    rows = server.server.config.app.state.worker.answer_rows
    server.server.config.app.state.worker.answer_rows = lambda requests: go_on.wait(30) and rows(requests)
    answers = []
    askers = [threading.Thread(target=lambda: answers.append(ask(server, "/rows", ASKED)[0])) for _ in range(2)]
    worker = server.server.config.app.state.worker
    askers[0].start()
    wait_until(lambda: worker.busy)
    askers[1].start()
    wait_until(lambda: worker.waiting == 1)
    status, found, headers = ask(server, "/rows", ASKED)
    assert status == 429 and int(headers["retry-after"]) >= 1 and "queue is full" in found["error"]
    go_on.set()
    for one in askers:
        one.join()
    assert answers == [200, 200]


def test_a_defect_or_a_lack_of_memory_is_of_the_request_and_not_of_the_server(served_model, live):
    server = live(served_model)
    worker = server.server.config.app.state.worker
    rows, worker.answer_rows = worker.answer_rows, lambda requests: (_ for _ in ()).throw(MemoryError("no room"))
    status, found, _ = ask(server, "/rows", ASKED)
    assert status == 500 and found["error"] == "MemoryError: no room"
    worker.answer_rows = rows
    assert ask(server, "/rows", ASKED)[0] == 200


def test_everything_is_counted(served_model, live):
    server = live(served_model)
    for _ in range(3):
        ask(server, "/rows", ASKED)
    ask(server, "/rows", b"{")
    ask(server, "/sample", SAMPLE)
    assert count(server, 'minillm_requests_total{path="/rows",status="200"}') == 3
    assert count(server, 'minillm_requests_total{path="/rows",status="400"}') == 1
    assert count(server, "minillm_rows_total") == 6 and count(server, "minillm_read_tokens_total") == 15
    assert count(server, "minillm_passes_total") == 4 == count(server, "minillm_pass_requests_total")
    assert count(server, "minillm_answered_prompts_total") == 1 and count(server, "minillm_waiting_requests") == 0
    assert count(server, 'minillm_request_seconds_count{path="/rows"}') == 4
    _, text, headers = ask(server, "/metrics")
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    names = [line.split()[2] for line in text.decode().splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) and all(name.startswith("minillm_") for name in names)


def test_requests_in_hand_are_answered_before_a_server_stops(served_model, live):
    server, go_on, answers = live(served_model), threading.Event(), []
    worker = server.server.config.app.state.worker
    rows = worker.answer_rows
    worker.answer_rows = lambda requests: go_on.wait(30) and rows(requests)
    asker = threading.Thread(target=lambda: answers.append(ask(server, "/rows", ASKED)[0]))
    asker.start()
    wait_until(lambda: worker.busy)
    server.server.should_exit = True
    go_on.set()
    asker.join()
    server.thread.join()
    assert answers == [200]
    with pytest.raises(urllib3.exceptions.HTTPError):
        ask(server, "/health")


def wait_until(true) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)
