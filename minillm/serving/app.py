"""The HTTP side of a server: who may ask, how much, and what a request that cannot be answered is told.

GET  /health     {"status": "ok"}, for anyone
GET  /model      the model's names, sizes and fingerprints
GET  /tokenizer  {name: content} of the tokenizer's files
GET  /head       the LM head as safetensors
POST /rows       texts in, rows as safetensors out: minillm.teachers.wire.RowsRequest
POST /sample     prompts in, answers as safetensors out: minillm.teachers.wire.SampleRequest
GET  /metrics    counts for Prometheus
"""

import asyncio
import contextlib
import hmac
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from minillm import UserError
from minillm.serving.served_model import ServedModel
from minillm.serving.server_metrics import CONTENT_TYPE, ServerMetrics
from minillm.serving.worker import QueueFull, Stopping, Worker, padded_tokens
from minillm.teachers.wire import FINGERPRINT, JSON, SAFETENSORS, RowsRequest, SampleRequest

MIB = 2**20
STILL_THERE = 1.0  # seconds between two looks at whether a client waits
Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask, and all of them together."""

    batch_tokens: int | None = None  # padded positions of a shared forward pass; None: none is shared
    request_tokens: int = 131_072  # padded positions of one request
    request_bytes: int = 64 * MIB  # of its body
    queue_size: int = 64  # requests that wait


def make_app(served: ServedModel, limits: Limits, *, token: str | None) -> Starlette:
    """The application. With a token, everything but /health asks for it as `Authorization: Bearer TOKEN`."""
    metrics = ServerMetrics()
    worker = Worker(
        served.rows,
        served.sample,
        metrics,
        batch_tokens=limits.batch_tokens,
        queue_size=limits.queue_size,
    )
    described = {**served.described, "batch_tokens": limits.batch_tokens}
    tokenizer = _tokenizer_files(served)
    head: list[bytes] = []  # once it has been asked for

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def model(request: Request) -> Response:
        return JSONResponse(described)

    async def files(request: Request) -> Response:
        return JSONResponse(tokenizer)

    async def lm_head(request: Request) -> Response:
        if not head:
            head.append(served.head())
        return Response(head[0], media_type=SAFETENSORS)

    async def counts(request: Request) -> Response:
        return Response(metrics.text(waiting=worker.waiting), media_type=CONTENT_TYPE)

    async def rows(request: Request) -> Response:
        body = await _body(request, limits.request_bytes)
        content_type = request.headers.get("content-type", SAFETENSORS)
        if not content_type.startswith((JSON, SAFETENSORS)):
            raise HTTPException(415, f"expected a body of type {JSON} or {SAFETENSORS}, not {content_type[:80]}")
        # off the loop: what a large request takes to be read must not keep the others waiting
        asked = await asyncio.to_thread(RowsRequest.read, request.query_params, body, content_type)
        _require_size(padded_tokens(asked), limits)
        await asyncio.to_thread(served.require_readable, asked)
        return await _answer(worker, asked, request)

    async def sample(request: Request) -> Response:
        asked = SampleRequest.read(await _body(request, limits.request_bytes))
        served.require_answerable(asked)
        _require_size(padded_tokens(asked), limits)
        return await _answer(worker, asked, request)

    @contextlib.asynccontextmanager
    async def running(app: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    def guarded(endpoint: Endpoint, *, open_to_all: bool = False) -> Endpoint:
        async def answer(request: Request) -> Response:
            started = time.perf_counter()
            if token is not None and not open_to_all and not _is_authorised(request, token):
                response = _refusal(401, "a bearer token is needed: Authorization: Bearer TOKEN")
                response.headers["www-authenticate"] = "Bearer"
            else:
                response = await _answered(endpoint, request)
            response.headers[FINGERPRINT] = served.fingerprint
            metrics.answered(
                request.url.path,
                response.status_code,
                time.perf_counter() - started,
                received=int(request.headers.get("content-length") or 0),
                sent=len(response.body),
            )
            return response

        return answer

    routes = [
        Route("/health", guarded(health, open_to_all=True)),
        Route("/model", guarded(model)),
        Route("/tokenizer", guarded(files)),
        Route("/head", guarded(lm_head)),
        Route("/metrics", guarded(counts)),
        Route("/rows", guarded(rows), methods=["POST"]),
        Route("/sample", guarded(sample), methods=["POST"]),
    ]
    app = Starlette(routes=routes, lifespan=running)
    app.state.metrics, app.state.worker = metrics, worker
    return app


async def _answered(endpoint: Endpoint, request: Request) -> Response:
    """The answer of an endpoint, or the refusal that it raised."""
    try:
        return await endpoint(request)
    except HTTPException as error:
        return _refusal(error.status_code, error.detail)
    except UserError as error:
        return _refusal(400, str(error))
    except QueueFull as error:
        response = _refusal(429, str(error))
        response.headers["retry-after"] = str(error.retry_after)
        return response
    except Stopping as error:
        return _refusal(503, str(error))
    except ClientDisconnect:
        return _refusal(499, "the client has left")
    except Exception as error:  # no memory left, or a defect: of this request, and not of the server
        return _refusal(500, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


async def _answer(worker: Worker, asked: RowsRequest | SampleRequest, request: Request) -> Response:
    promised = worker.submit(asked)
    answer = asyncio.wrap_future(promised)
    while not (await asyncio.wait({answer}, timeout=STILL_THERE))[0]:
        if await request.is_disconnected():
            promised.cancel()  # the model is not run for nobody, unless it has begun
            raise ClientDisconnect
    return Response(answer.result(), media_type=SAFETENSORS)


async def _body(request: Request, most: int) -> bytes:
    parts, size = [], 0
    too_large = HTTPException(413, f"this server takes requests of at most {most:,} bytes (--max-request-mib)")
    if int(request.headers.get("content-length") or 0) > most:
        raise too_large
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise too_large
        parts.append(part)
    return b"".join(parts)


def _require_size(tokens: int, limits: Limits) -> None:
    if tokens > limits.request_tokens:
        raise HTTPException(
            413,
            f"the request takes {tokens:,} positions, padded, and this server takes at most {limits.request_tokens:,} at a "
            "time (--max-request-tokens); ask for fewer or shorter texts side by side",
        )


def _is_authorised(request: Request, token: str) -> bool:
    given = request.headers.get("authorization", "")
    return hmac.compare_digest(given.encode(), f"Bearer {token}".encode())


def _refusal(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status_code=status)


def _tokenizer_files(served: ServedModel) -> dict[str, str]:
    """The files of the tokenizer by their names, each a text."""
    with tempfile.TemporaryDirectory() as folder:
        served.tokenizer.save_pretrained(folder)
        texts = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
    try:
        return {name: text.decode() for name, text in texts.items()}
    except UnicodeDecodeError:  # a SentencePiece model, which no file of text replaces
        raise UserError(
            f"the tokenizer of {served.described['model']} is kept in binary files ({', '.join(texts)}); serve it with one "
            "that has a tokenizer.json (--tokenizer)"
        ) from None
