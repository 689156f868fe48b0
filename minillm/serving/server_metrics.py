"""The counts of a server in the text form of Prometheus (exposition format 0.0.4)."""

import threading
from collections import Counter
from collections.abc import Sequence

from minillm.teachers.wire import RowsRequest, SampleRequest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
HELP = {
    "minillm_requests_total": "Requests that were answered, by path and status.",
    "minillm_request_seconds_sum": "Seconds from a request's arrival to its answer, by path.",
    "minillm_request_seconds_count": "Requests that these seconds are of, by path.",
    "minillm_received_bytes_total": "Bytes of requests' bodies.",
    "minillm_sent_bytes_total": "Bytes of answers' bodies.",
    "minillm_passes_total": "Times that the model was run: forward passes for rows, and answers sampled side by side.",
    "minillm_pass_requests_total": "Requests that these passes were for.",
    "minillm_pass_seconds_total": "Seconds that the model was busy.",
    "minillm_rows_total": "Rows that were given.",
    "minillm_read_tokens_total": "Tokens of texts that the model read for rows, without padding.",
    "minillm_answered_prompts_total": "Prompts that were answered.",
    "minillm_waiting_requests": "Requests in the queue.",
}


class ServerMetrics:
    """Counts that only rise, from any thread."""

    def __init__(self):
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()  # (name, labels)

    def answered(self, path: str, status: int, seconds: float, *, received: int, sent: int) -> None:
        """Count a request."""
        label = f'{{path="{path}"}}'
        with self._lock:
            self._counts["minillm_requests_total", f'{{path="{path}",status="{status}"}}'] += 1
            self._counts["minillm_request_seconds_sum", label] += seconds
            self._counts["minillm_request_seconds_count", label] += 1
            self._counts["minillm_received_bytes_total", ""] += received
            self._counts["minillm_sent_bytes_total", ""] += sent

    def passed(self, seconds: float, requests: Sequence[RowsRequest | SampleRequest]) -> None:
        """Count a pass of the model."""
        rows = [one for one in requests if isinstance(one, RowsRequest)]
        read = sum(len(text.prompt) + len(text.response) for one in rows for text in one.sequences)
        with self._lock:
            self._counts["minillm_passes_total", ""] += 1
            self._counts["minillm_pass_requests_total", ""] += len(requests)
            self._counts["minillm_pass_seconds_total", ""] += seconds
            self._counts["minillm_rows_total", ""] += sum(one.count for one in rows)
            self._counts["minillm_read_tokens_total", ""] += read
            self._counts["minillm_answered_prompts_total", ""] += sum(
                len(one.prompts) for one in requests if isinstance(one, SampleRequest)
            )

    def text(self, *, waiting: int) -> str:
        """All counts, and the number of requests that wait."""
        with self._lock:
            counts = {**self._counts, ("minillm_waiting_requests", ""): waiting}
        lines = []
        for name, words in HELP.items():
            kind = "gauge" if name == "minillm_waiting_requests" else "counter"
            lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{labels} {value:g}" if isinstance(value, float) else f"{name}{labels} {value}"
                      for (of, labels), value in sorted(counts.items()) if of == name]  # fmt: skip
        return "\n".join(lines) + "\n"
