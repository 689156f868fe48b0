"""Which answers of a server are waited for, and which count as none."""

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from minillm.config.models import ServedTeacherConfig
from minillm.teachers.server_pool import ServerPool, TeacherAway


@contextmanager
def answering(*answers: tuple[int, dict[str, str]]) -> Iterator[ServerPool]:
    """A pool of one server that gives these answers, status and headers, and the last one from then on."""
    left = list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            for name, value in {**headers, "content-length": "2"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *words):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        pool = ServerPool(ServedTeacherConfig(type="served", url=url, patience_seconds=0.4))
        try:
            yield pool
        finally:
            pool.close()
            server.shutdown()


def test_servers_that_only_say_that_there_is_no_service_are_away():
    with answering((503, {})) as pool:
        late = threading.Timer(20, pool.close)  # a run would wait for ever
        late.start()
        with pytest.raises(TeacherAway, match="no server of the teacher has answered for 0.4 s .*status 503"):
            pool.request("GET", "/model")
        late.cancel()


@pytest.mark.parametrize("busy", [(429, {}), (503, {"retry-after": "1"})], ids=["429", "503 with a time"])
def test_a_busy_server_is_waited_for_beyond_the_patience(busy):
    with answering(busy, busy, busy, busy, (200, {})) as pool:
        began = time.monotonic()
        assert pool.request("GET", "/model") == b"{}"
        assert time.monotonic() - began > pool.config.patience_seconds
