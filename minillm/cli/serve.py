"""`minillm serve`: a teacher behind HTTP, for students that are trained in other processes."""

import argparse
import ipaddress
import os
import signal
import socket
import ssl
from pathlib import Path

import transformers

from minillm import UserError
from minillm.config.models import TeacherConfig
from minillm.models.device import pick_device
from minillm.models.loading import load_teacher
from minillm.models.open import model_path
from minillm.models.tokenizers import load_tokenizer
from minillm.serving.served_model import ServedModel

try:
    import uvicorn

    from minillm.serving.app import MIB, Limits, make_app
except ModuleNotFoundError as error:
    raise UserError(
        f"`minillm serve` needs {error.name}, which is not installed: pip install -e '.[serve]' in minillm's folder"
    ) from error

KEEP_ALIVE = 120  # seconds that a connection is kept between two steps of a client


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C; requests in hand are answered first.

    Raises UserError for a host beyond loopback without a token, TLS files that do not go together, an address that is
    taken, and whatever loading raises.
    """
    token = _token(arguments.host, arguments.token_env)
    tls = _tls(arguments.tls_cert, arguments.tls_key)
    listening = listen(arguments.host, arguments.port)
    with listening:
        served = open_served(
            arguments.model,
            dtype=arguments.dtype,
            quantization=arguments.quantization,
            device=arguments.device,
            tokenizer=arguments.tokenizer,
        )
        limits = Limits(
            arguments.batch_tokens, arguments.max_request_tokens, arguments.max_request_mib * MIB, arguments.queue
        )
        app = make_app(served, limits, token=token)
        scheme, (host, port) = "https" if tls else "http", listening.getsockname()[:2]
        address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        said = served.described
        print(
            f"serving {said['model']} ({said['architecture']}, {said['vocab_size']:,} ids, {said['dtype']}) at {address}, "
            f"{'with a token' if token else 'for anyone on this machine'}",
            flush=True,
        )
        config = uvicorn.Config(
            app,
            log_level="warning",
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=arguments.grace,
            **tls,
        )
        # uvicorn raises the signal again once it has stopped: a server that was told to stop has done nothing wrong
        before = signal.signal(signal.SIGTERM, lambda number, frame: None)
        try:
            uvicorn.Server(config).run(sockets=[listening])
        finally:
            signal.signal(signal.SIGTERM, before)
    return 0


def open_served(
    model: str,
    *,
    dtype: str = "float32",
    quantization: str | None = None,
    device: str = "auto",
    tokenizer: str | None = None,
) -> ServedModel:
    """The model to serve, as the command line names it. Raises UserError where it cannot be read."""
    transformers.utils.logging.disable_progress_bar()
    config = TeacherConfig(path=model_path(model), dtype=dtype, quantization=quantization, tokenizer=tokenizer)
    here = Path(".")
    weights = load_teacher(config, output_dir=here, device=pick_device(device, "--device"))
    return ServedModel(model, weights, load_tokenizer(config, here))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError for an address that is taken or not of this machine."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from None


def _token(host: str, variable: str) -> str | None:
    token = os.environ.get(variable)
    if token == "" or token is not None and not (token.isascii() and token.isprintable()):
        raise UserError(f"{variable} holds no token: it must be printable ASCII, and not empty")
    if token is None and not _is_loopback(host):
        raise UserError(
            f"--host {host} lets other machines ask, and there is no token: set {variable} (openssl rand -hex 32), for the "
            "clients too, or listen on 127.0.0.1"
        )
    return token


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may lead anywhere
        return False


def _tls(certificate: Path | None, key: Path | None) -> dict[str, str]:
    """The arguments of uvicorn for HTTPS; {} without."""
    if certificate is None and key is None:
        return {}
    if certificate is None or key is None:
        raise UserError("--tls-cert and --tls-key go together: the certificate chain, and its private key")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise UserError(f"--tls-cert {certificate} --tls-key {key}: {error}") from None
    return {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
