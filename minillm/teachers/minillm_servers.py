"""Servers of `minillm serve`, whose every answer carries the fingerprint of the weights that gave it."""

from typing import Any

import urllib3

from minillm import UserError
from minillm.teachers.server_pool import Server, ServerPool
from minillm.teachers.wire import FINGERPRINT, VERSION


class MinillmServers(ServerPool):
    """See the module, and ServerPool."""

    kind = "server of minillm"

    def read_json(self, path: str) -> dict[str, Any]:
        """The JSON object that a server has at a path."""
        self.described  # noqa: B018  so that the answer is compared with it
        return self.read(self.request("GET", path))

    def _describe(self) -> dict[str, Any]:
        found = self.read(self.request("GET", "/model"))
        if found.get("version") != VERSION:
            raise UserError(
                f"{self._names()} speaks version {found.get('version')}, and this is {VERSION}; use one of minillm"
            )
        wanted = self.config.model
        if wanted is not None and found["model"] != wanted:
            raise UserError(f"{self._names()} serves {found['model']}, and teacher.model is {wanted}")
        return found

    def _require_same(self, server: Server, answer: urllib3.BaseHTTPResponse) -> None:
        expected = self._described and self._described["fingerprint"]
        fingerprint = answer.headers.get(FINGERPRINT)
        if expected and fingerprint != expected:
            raise UserError(
                f"{server.url} serves other weights than {self._described['model']}, which this run has learned from so far "
                f"(fingerprint {str(fingerprint)[:12]}..., expected {expected[:12]}...): serve the same model there, in the "
                "same dtype, or take it out of teacher.url"
            )
