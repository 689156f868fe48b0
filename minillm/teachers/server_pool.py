"""The servers of one teacher: requests are spread over them and repeated until one answers."""

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
from minillm.teachers.wire import FINGERPRINT, VERSION

CONNECT_SECONDS = 5.0
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0  # seconds that a server which is away is left alone
AT_ONCE = 2  # requests in flight for each server: one is worked on, and the next one is there
BUSY = (429, 503)
T = TypeVar("T")
log = logging.getLogger("minillm.teachers")


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


class ServerPool:
    """All servers of a teacher, which must serve the same model: whoever answers is compared with the first that did.

    Args:
        config: the addresses, and the variable that holds the token.

    Raises UserError where that variable is not set.
    """

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
        """The answer to /model of the first server that gave it.

        Raises UserError for a server of another version, and where another model is served than teacher.model.
        """
        if self._described is None:
            found = self._read_json(self.request("GET", "/model"))
            if found.get("version") != VERSION:
                raise UserError(
                    f"{self._names()} speaks version {found.get('version')}, and this is {VERSION}; use one of minillm"
                )
            wanted = self.config.model
            if wanted is not None and found["model"] != wanted:
                raise UserError(f"{self._names()} serves {found['model']}, and teacher.model is {wanted}")
            self._described = found
        return self._described

    def read_json(self, path: str) -> dict[str, Any]:
        """The JSON object that a server has at a path."""
        self.described  # noqa: B018  so that the answer is compared with it
        return self._read_json(self.request("GET", path))

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
        headers = self.headers | ({} if content_type is None else {"content-type": content_type})
        path += f"?{urlencode(query)}" if query else ""
        alone_since: float | None = None
        while True:
            server = self._next()
            if server is None:
                now = time.monotonic()
                alone_since = now if alone_since is None else alone_since
                if now - alone_since > self.config.patience_seconds:
                    raise TeacherAway(self._why_away())
                wait = max(0.01, min(one.resting_until for one in self.servers) - now)
                if self._closed.wait(wait):
                    raise TeacherAway("the teacher was closed")
                continue
            try:
                answer = self._http.request(method, server.url + path, body=body, headers=headers)
            except urllib3.exceptions.HTTPError as error:
                self._failed(server, " ".join(str(error).split()))
                continue
            finally:
                with self._lock:
                    server.in_flight -= 1
            if answer.status in BUSY:  # it is there
                alone_since = None
                self._busy(server, answer)
            elif answer.status >= 500:
                self._failed(server, f"status {answer.status}: {_error(answer)}")
            elif answer.status != 200:
                raise UserError(self._refused(server, answer))
            else:
                self._answered(server, answer.headers.get(FINGERPRINT))
                return answer.data

    def close(self) -> None:
        """End every wait."""
        self._closed.set()
        self._http.clear()

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

    def _answered(self, server: Server, fingerprint: str | None) -> None:
        with self._lock:
            came_back, server.failures = server.failures > 0, 0
        if came_back:
            log.warning("%s is back", server.url)
        expected = self._described and self._described["fingerprint"]
        if expected and fingerprint != expected:
            raise UserError(
                f"{server.url} serves other weights than {self._described['model']}, which this run has learned from so far "
                f"(fingerprint {str(fingerprint)[:12]}..., expected {expected[:12]}...): serve the same model there, in the "
                "same dtype, or take it out of teacher.url"
            )

    def _busy(self, server: Server, answer: urllib3.BaseHTTPResponse) -> None:
        said = answer.headers.get("retry-after", "")
        seconds = min(float(said), LONGEST_WAIT) if said.isdigit() else FIRST_WAIT
        with self._lock:
            server.resting_until = time.monotonic() + seconds * random.uniform(0.5, 1.0)

    def _failed(self, server: Server, problem: str) -> None:
        with self._lock:
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(server.failures, 10))
            server.resting_until = time.monotonic() + wait * random.uniform(0.5, 1.0)
            server.failures, server.problem = server.failures + 1, problem
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

    def _read_json(self, body: bytes) -> dict[str, Any]:
        try:
            found = json.loads(body)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self._names()} is no server of minillm: what it says is not JSON")
        return found


def _error(answer: urllib3.BaseHTTPResponse) -> str:
    """The words of a refusal."""
    try:
        return str(json.loads(answer.data)["error"])[:500]
    except (ValueError, KeyError, TypeError):
        return f"{answer.reason or 'no reason given'}"
