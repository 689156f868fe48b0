"""Servers of tiny teachers in threads of this process, on loopback ports."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
import uvicorn

from minillm.cli.serve import listen
from minillm.config.models import ServedTeacherConfig
from minillm.serving.app import Limits, make_app
from minillm.serving.served_model import ServedModel
from minillm.teachers.served import ServedTeacher
from tests.conftest import tiny_llama


class LiveServer:
    """A server that can be stopped and started again at the same address."""

    def __init__(self, served: ServedModel, limits: Limits = Limits(), *, wrap=lambda app: app, **options):
        self.served, self.limits, self.wrap = served, limits, wrap
        self.options = {"token": None, **options}
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def app(self):
        """What answers its requests."""
        return self.wrap(make_app(self.served, self.limits, **self.options))

    def start(self) -> None:
        app = self.app()
        socket = listen("127.0.0.1", self.port)
        self.port = socket.getsockname()[1]
        self.server = uvicorn.Server(
            uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=5)
        )
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [socket]}, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture
def teacher_model(make_models):
    """The teacher of `make_models`, as a model."""
    return make_models().teacher.model


@pytest.fixture
def served_model(make_models) -> ServedModel:
    """The teacher of `make_models` as a server has it."""
    models = make_models()
    return ServedModel("tiny", models.teacher.model, models.tokenizer)


@pytest.fixture
def other_model(make_models) -> ServedModel:
    """A model of the same shape with other weights."""
    tokenizer = make_models().tokenizer
    return ServedModel("other", tiny_llama(vocab_size=len(tokenizer), hidden_size=48, seed=7), tokenizer)


@pytest.fixture
def live() -> Iterator[Callable[..., LiveServer]]:
    """A function that starts a server, which is stopped at the end of the test."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, **options) -> LiveServer:
            server = LiveServer(*arguments, **options)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture
def connect() -> Iterator[Callable[..., ServedTeacher]]:
    """A function that makes the client of some servers."""
    with contextlib.ExitStack() as stack:

        def make(*servers: LiveServer | str, **keys) -> ServedTeacher:
            urls = [one if isinstance(one, str) else one.url for one in servers]
            teacher = ServedTeacher(ServedTeacherConfig(type="served", url=urls, **keys), torch.device("cpu"))
            stack.callback(teacher.close)
            return teacher

        yield make
