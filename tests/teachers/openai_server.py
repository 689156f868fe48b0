"""A server that answers as vLLM's of the OpenAI protocol does, from a tiny model of transformers."""

import json
from collections.abc import Callable

import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from minillm.losses import TopK
from minillm.teachers.local import LocalTeacher
from tests.serving.conftest import LiveServer


class FakeVllm(LiveServer):
    """Serves one model under some names.

    Args:
        alter: changes the completions that are about to be sent.
        requests: the bodies of all that asked for them.
    """

    def __init__(self, model, *, names=("tiny",), longest=512, most=20, token=None, alter: Callable | None = None):
        self.model, self.names, self.longest, self.most = model, names, longest, most
        self.token, self.alter, self.requests, self.port = token, alter, [], 0
        self.start()

    def app(self) -> Starlette:
        async def models(request: Request) -> Response:
            cards = [{"id": name, "root": "/models/root", "max_model_len": self.longest} for name in self.names]
            return self.guarded(request) or JSONResponse({"object": "list", "data": cards})

        async def completions(request: Request) -> Response:
            asked = json.loads(await request.body())
            self.requests.append(asked)
            if refusal := self.guarded(request) or self.refusal(asked):
                return refusal
            said = {
                "object": "text_completion",
                "choices": [self.choice(*one, asked) for one in enumerate(asked["prompt"])],
            }
            said = self.alter(said) if self.alter else said
            return Response(json.dumps(said), media_type="application/json")

        return Starlette(routes=[Route("/v1/models", models), Route("/v1/completions", completions, methods=["POST"])])

    def guarded(self, request: Request) -> Response | None:
        if self.token is not None and request.headers.get("authorization") != f"Bearer {self.token}":
            return JSONResponse({"error": "Unauthorized"}, status_code=401)
        return None

    def refusal(self, asked: dict) -> Response | None:
        size, k = self.model.config.vocab_size, asked["prompt_logprobs"]
        if asked["model"] not in self.names:
            return _error(404, f"The model `{asked['model']}` does not exist.")
        if k > self.most:
            return _error(400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most}")
        if any(not 0 <= one < size for text in asked["prompt"] for one in text):
            return _error(400, "Token id is out of vocabulary")
        if any(len(text) + asked["max_tokens"] > self.longest for text in asked["prompt"]):
            return _error(400, f"This model's maximum context length is {self.longest} tokens.")
        return None

    @torch.no_grad()
    def choice(self, index: int, text: list[int], asked: dict) -> dict:
        """What vLLM says of one text: its own token first, whatever its rank, and the likeliest in their order."""
        scores = self.model(torch.tensor([text])).logits[0].float().log_softmax(-1)
        places: list[dict | None] = [None]
        for row, own in zip(scores, text[1:], strict=False):
            best = row.topk(asked["prompt_logprobs"])
            named = {own: {"logprob": row[own].item(), "rank": int((row >= row[own]).sum())}}
            for rank, (value, token) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), 1):
                named[token] = {"logprob": value, "rank": rank}
            for one in named.values():
                one["logprob"] = max(one["logprob"], -9999.0)
            places.append({str(token): one | {"decoded_token": "?"} for token, one in named.items()})
        return {"index": index, "text": "?", "finish_reason": "length", "prompt_logprobs": places}


def cut(teacher: LocalTeacher, batch, k: int, size: int | None = None) -> TopK:
    """The rows of a teacher that is here, cut to each token's own id and the k - 1 likeliest others below `size`."""
    with teacher.head() as head:
        scores = (teacher.rows(batch).hidden @ head.weight.T).float().log_softmax(-1).detach()
    own = batch.labels[:, None]
    others = scores.scatter(1, own, -torch.inf)[:, :size].topk(k - 1).indices
    ids = torch.cat([own, others], 1)
    return TopK(ids, scores.gather(1, ids))


def _error(status: int, words: str) -> Response:
    return JSONResponse({"error": {"message": words, "type": "BadRequestError", "code": status}}, status_code=status)
