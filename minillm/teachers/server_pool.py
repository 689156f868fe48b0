"""The servers of one teacher: requests are spread over them and repeated until one answers. What they speak is said by the
two kinds of pool, minillm_servers.py and openai_servers.py."""

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlencode

import urllib3

from minillm import UserError
from minillm.config.models import ServedTeacherConfig

CONNECT_SECONDS = 5.0
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0  # seconds that a server which is away is left alone
AT_ONCE = 2  # requests in flight for each server: one is worked on, and the next one is there
T = TypeVar("T")
log = logging.getLogger("minillm.teachers")


class _Unanswered(Exception):
    """A server that has given no answer to a request, which is to be asked for again. `busy`: it is there."""

    def __init__(self, *, busy: bool):
        super().__init__()
        self.busy = busy


class TeacherAway(UserError):
    """No server has answered for longer than teacher.patience_seconds. `everywhere`: all ranks of the run know."""

    exit_status = 1

    def __init__(self, message: str, *, everywhere: bool = False):
        super().__init__(message)
        self.everywhere = everywhere


@dataclass
class Server:
    """One of them, as far as this client knows."""

    url: str
    in_flight: int = 0
    failures: int = 0  # in a row
    resting_until: float = 0.0  # on the monotonic clock
    problem: str = ""  # of the last failure
    admitted: bool = False  # it has been looked at since it was last away


class ServerPool:
    """All servers of a teacher, which must serve the same model: whoever answers is compared with the first that did.

    A subclass says how they describe themselves (`_describe`), and how one is compared: before it is asked for anything
    (`_admit`), or by every answer that it gives (`_require_same`).

    Args:
        config: the addresses, and the variable that holds the token.

    Raises UserError where that variable is not set.
    """

    kind: str  # of server, in messages

    def __init__(self, config: ServedTeacherConfig):
        self.config, self.servers = config, [Server(url) for url in config.urls]
        self.headers = {"accept-encoding": "identity"}
        if config.token_env is not None:
            token = os.environ.get(config.token_env)
            if not token:
                raise UserError(f"teacher.token_env: the environment variable {config.token_env} is not set")
            self.headers["authorization"] = f"Bearer {token}"
        self._http = urllib3.PoolManager(
            num_pools=len(self.servers),
            maxsize=AT_ONCE + 1,
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=config.timeout_seconds),
            retries=False,
        )
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._room = threading.BoundedSemaphore(AT_ONCE * len(self.servers))
        self._described: dict[str, Any] | None = None

    @property
    def described(self) -> dict[str, Any]:
        """The model, as the first server that answered describes it.

        Raises UserError for a server of another kind, and where another model is served than teacher.model.
        """
        if self._described is None:
            self._described = self._describe()
        return self._described

    def in_background(self, work: Callable[[], T]) -> "Future[T]":
        """The result of work that waits for servers, when there is one. Threads end with the process, whatever they wait for."""
        promised: Future[T] = Future()

        def run() -> None:
            with self._room:
                if not promised.set_running_or_notify_cancel():
                    return
                try:
                    promised.set_result(work())
                except BaseException as error:
                    promised.set_exception(error)

        threading.Thread(target=run, name="minillm-teacher", daemon=True).start()
        return promised

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: bytes | None = None,
        content_type: str | None = None,
    ) -> bytes:
        """The body of the answer, from whichever server gives it.

        Raises TeacherAway where none does, and UserError for what no server would answer, and for another model.
        """
        path += f"?{urlencode(query)}" if query else ""
        alone_since: float | None = None
        while True:
            server = self._next()
            if server is None:
                now = time.monotonic()
                if any(not one.failures for one in self.servers):
                    alone_since = None  # one of them asked for time, of this thread or of another
                else:
                    alone_since = now if alone_since is None else alone_since
                    if now - alone_since > self.config.patience_seconds:
                        raise TeacherAway(self._why_away())
                wait = max(0.01, min(one.resting_until for one in self.servers) - now)
                if self._closed.wait(wait):
                    raise TeacherAway("the teacher was closed")
                continue
            try:
                if self._described is not None and not server.admitted:
                    self._admit(server)
                    server.admitted = server.failures == 0  # another thread may have found it away meanwhile
                return self._send(server, method, path, body=body, content_type=content_type)
            except _Unanswered as reason:
                alone_since = None if reason.busy else alone_since
            finally:
                with self._lock:
                    server.in_flight -= 1

    def read(self, body: bytes) -> dict[str, Any]:
        """The JSON object of an answer. UserError for anything else."""
        try:
            found = json.loads(body)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self._names()} is no {self.kind}: what it says is not JSON")
        return found

    def close(self) -> None:
        """End every wait."""
        self._closed.set()
        self._http.clear()

    def _describe(self) -> dict[str, Any]:
        """The description of the model; UserError where it is not the one that is wanted."""
        raise NotImplementedError

    def _admit(self, server: Server) -> None:
        """Look at a server before it is asked for anything. UserError for another model."""

    def _require_same(self, server: Server, answer: urllib3.BaseHTTPResponse) -> None:
        """Look at an answer that a server has given. UserError for another model's."""

    def _send(
        self, server: Server, method: str, path: str, *, body: bytes | None = None, content_type: str | None = None
    ) -> bytes:
        """The body of one server's answer. Raises _Unanswered where it gives none now, UserError for what it refuses."""
        headers = self.headers | ({} if content_type is None else {"content-type": content_type})
        try:
            answer = self._http.request(method, server.url + path, body=body, headers=headers)
        except urllib3.exceptions.HTTPError as error:
            self._failed(server, " ".join(str(error).split()))
            raise _Unanswered(busy=False) from None
        # without a time, 503 is said by a server that is stopping, or for one that is gone
        if answer.status == 429 or answer.status == 503 and "retry-after" in answer.headers:
            self._busy(server, answer)
            raise _Unanswered(busy=True)
        if answer.status >= 500:
            self._failed(server, f"status {answer.status}: {_error(answer)}")
            raise _Unanswered(busy=False)
        if answer.status != 200:
            raise UserError(self._refused(server, answer))
        self._answered(server)
        self._require_same(server, answer)
        return answer.data

    def _next(self) -> Server | None:
        """The server that has the least to do; None where all are left alone for now."""
        with self._lock:
            now = time.monotonic()
            ready = [one for one in self.servers if one.resting_until <= now]
            if not ready:
                return None
            server = min(ready, key=lambda one: (one.in_flight, one.failures, self.servers.index(one)))
            server.in_flight += 1
            return server

    def _busy(self, server: Server, answer: urllib3.BaseHTTPResponse) -> None:
        said = answer.headers.get("retry-after", "")
        seconds = min(float(said), LONGEST_WAIT) if said.isdigit() else FIRST_WAIT
        self._answered(server)
        with self._lock:
            server.resting_until = time.monotonic() + seconds * random.uniform(0.5, 1.0)

    def _answered(self, server: Server) -> None:
        with self._lock:
            came_back, server.failures = server.failures > 0, 0
        if came_back:
            log.warning("%s is back", server.url)

    def _failed(self, server: Server, problem: str) -> None:
        with self._lock:
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(server.failures, 10))
            server.resting_until = time.monotonic() + wait * random.uniform(0.5, 1.0)
            server.failures, server.problem, server.admitted = server.failures + 1, problem, False
            first = server.failures == 1
        patience = self.config.patience_seconds
        if first and patience:
            log.warning("%s does not answer (%s); it is tried again, for up to %g s", server.url, problem, patience)

    def _why_away(self) -> str:
        problems = "; ".join(f"{one.url}: {one.problem or 'busy'}" for one in self.servers)
        return f"no server of the teacher has answered for {self.config.patience_seconds:g} s ({problems})"

    def _refused(self, server: Server, answer: urllib3.BaseHTTPResponse) -> str:
        if answer.status in (401, 403):
            variable = self.config.token_env
            remedy = (
                "set teacher.token_env" if variable is None else f"{variable} holds another token than the server's"
            )
            return f"{server.url} refuses this client ({_error(answer)}): {remedy}"
        return f"{server.url} refuses a request (status {answer.status}): {_error(answer)}"

    def _names(self) -> str:
        return " or ".join(one.url for one in self.servers)


def _error(answer: urllib3.BaseHTTPResponse) -> str:
    """The words of a refusal: {"error": words}, {"error": {"message": words}}, {"message": words} or {"detail": words}."""
    try:
        said = json.loads(answer.data)
        for name in ("error", "message", "detail"):
            said = said.get(name, said) if isinstance(said, dict) else said
    except ValueError:
        said = None
    return f"{answer.reason or 'no reason given'}" if said is None else " ".join(str(said).split())[:500]
