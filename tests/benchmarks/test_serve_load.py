"""The load test finds an answer that is not the model's, and a request that is lost."""

import time
from argparse import Namespace

import pytest

from minillm.benchmarks.serve import Client, _ask, _cases
from minillm.teachers.wire import SampleRequest
from tests.serving.conftest import connect, live, other_model, served_model  # noqa: F401  fixtures


@pytest.fixture
def cases(served_model):  # noqa: F811
    found = _cases(served_model, Namespace(texts=2, tokens=8), count=20)
    assert sum(isinstance(one.request, SampleRequest) for one in found) == 1
    return found


def asked(teacher, cases, exact: bool) -> Client:
    client = Client(3)
    _ask(client, teacher, cases, time.monotonic() + 0.5, exact)
    return client


@pytest.mark.parametrize("exact", [True, False])
def test_right_answers_are_counted(served_model, cases, live, connect, exact):  # noqa: F811
    client = asked(connect(live(served_model)), cases, exact)
    assert client.problem is None and len(client.seconds) > 1 and client.rows > 1


@pytest.mark.parametrize("exact", [True, False])
def test_another_models_answer_is_found(other_model, cases, live, connect, exact):  # noqa: F811
    client = asked(connect(live(other_model)), cases, exact)
    assert client.problem.endswith("another answer than the model's") and len(client.seconds) == 1


def test_a_lost_request_is_found(served_model, cases, live, connect):  # noqa: F811
    server = live(served_model)
    teacher = connect(server, patience_seconds=0.0)
    server.stop()
    assert "no server of the teacher has answered" in asked(teacher, cases, True).problem
