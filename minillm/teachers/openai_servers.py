"""Servers of vLLM's form of the OpenAI protocol. None says which weights it has, so that each, before it is asked for rows,
and again when it was away, predicts one text; what two of them say of it is compared."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import urllib3

from minillm import UserError
from minillm.config.models import ServedTeacherConfig
from minillm.teachers.openai_wire import IMPOSSIBLE, LogprobsRequest, TooFewIds
from minillm.teachers.server_pool import Server, ServerPool
from minillm.teachers.wire import JSON, BadMessage

COMPLETIONS = "/v1/completions"
PROBED = 32  # ids of the text that every server predicts
SAME_NATS = 0.2  # mean difference that rounding may make in the log-probabilities of its tokens
Ask = Callable[..., bytes]


class OpenAIServers(ServerPool):
    """See the module, and ServerPool.

    Args:
        vocab_size: ids of the teacher's tokenizer, of which the text is made.

    Raises UserError for servers that do not give log-probabilities of a prompt's tokens, or not as many as teacher.k.
    """

    kind = "server of the OpenAI protocol"

    def __init__(self, config: ServedTeacherConfig, vocab_size: int):
        super().__init__(config)
        self.vocab_size = vocab_size

    def _describe(self) -> dict[str, Any]:
        """{"model": its name, "longest": ids of the longest text or None, "probe": log-probabilities of the text's tokens}."""
        return self._look(self.request)

    def _admit(self, server: Server) -> None:
        found, expected = self._look(partial(self._send, server)), self._described
        difference = probe_difference(expected["probe"], found["probe"])
        if difference is not None:
            raise UserError(
                f"{server.url} serves other weights than {expected['model']}, which this run has learned from so far: it "
                f"{difference}. Serve the same model there, or take it out of teacher.url"
            )
        if found["longest"] != expected["longest"]:
            raise UserError(
                f"{server.url} reads texts of {found['longest']} tokens, and another server {expected['longest']}: start both "
                "with the same --max-model-len"
            )

    def _look(self, ask: Ask) -> dict[str, Any]:
        model, longest = self._chosen(self.read(ask("GET", "/v1/models")))
        count = PROBED if longest is None else min(PROBED, longest)
        text = tuple(place * (self.vocab_size - 1) // (PROBED - 1) for place in range(count))
        asked = LogprobsRequest((text,), (1,), self.config.k)
        said = self.read(ask("POST", COMPLETIONS, body=asked.body(model), content_type=JSON))
        try:
            _, logprobs = asked.read(said)
        except BadMessage as error:
            raise UserError(f"{self._names()}: {error}") from None
        except TooFewIds as error:
            raise UserError(
                f"{self._names()} sends {self.config.k - error.lacking} ids a token, and teacher.k is {self.config.k}"
            ) from None
        return {"model": model, "longest": longest, "probe": logprobs[:, 0].clamp_min(IMPOSSIBLE).tolist()}

    def _chosen(self, listed: Mapping[str, Any]) -> tuple[str, int | None]:
        """The name of the model that is to be asked for, and the ids of the longest text that it reads with one more."""
        models = listed.get("data")
        models = [one for one in models if isinstance(one, dict)] if isinstance(models, list) else []
        names, wanted = [str(one.get("id")) for one in models], self.config.model
        fitting = [one for one in models if wanted in (None, one.get("id"))]
        # a server may have given the model that it was started with another name
        fitting = fitting or [one for one in models if one.get("root") == wanted]
        if not fitting:
            raise UserError(f"{self._names()} serves {', '.join(names) or 'no model'}, and teacher.model is {wanted}")
        if len(fitting) > 1:
            raise UserError(
                f"{self._names()} serves {', '.join(names)}: say in teacher.model which of them is the teacher"
            )
        most = fitting[0].get("max_model_len")
        return str(fitting[0]["id"]), most - 1 if type(most) is int else None

    def _refused(self, server: Server, answer: urllib3.BaseHTTPResponse) -> str:
        message = super()._refused(server, answer)
        if answer.status == 400 and "logprobs" in message:
            k = self.config.k
            message += f"; start the server with --max-logprobs {k}, or ask for fewer ids with teacher.k, which is {k}"
        return message


def probe_difference(before: Sequence[float], now: Sequence[float]) -> str | None:
    """The way in which two models' log-probabilities of one text's tokens differ; None where it is rounding."""
    if len(before) != len(now):
        return "predicts a text of another length"
    apart = sum(abs(one - other) for one, other in zip(before, now, strict=True)) / len(now)
    if apart <= SAME_NATS:
        return None
    return f"differs by {apart:.2g} nats a token, and rounding by at most {SAME_NATS}"
