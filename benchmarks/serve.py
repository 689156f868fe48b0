"""`minillm bench serve MODEL`: several clients at once ask one server of a model for rows and answers, as fast as they can.

Every answer is held against what the same model says here: a request that is lost, or answered with another one's rows,
is an error of the command. The memory of the server's process is measured throughout.
"""

import argparse
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load

from minillm import UserError
from minillm.benchmarks.machine import describe, show_page
from minillm.cli.serve import open_served
from minillm.config.models import ServedTeacherConfig
from minillm.models.batch import TokenSequence, collate
from minillm.serving.served_model import ServedModel
from minillm.teachers.served import ServedTeacher
from minillm.teachers.wire import RowsRequest, SampleRequest, unpack_answers

SAMPLED_EVERY = 20  # requests of a client; the others are for rows
SHARED = 2e-3  # of a row's norm: what rounding in a shared pass may change


@dataclass
class Client:
    """One client, and what it has seen."""

    number: int
    seconds: list[float] = field(default_factory=list)  # of every request
    rows: int = 0
    problem: str | None = None


def main(argv: list[str] | None = None) -> int:
    """Runs, prints a table, writes it with --output. Returns 1 where a request was lost or answered wrongly."""
    arguments = _parser().parse_args(argv)
    here = open_served(arguments.model, device="cpu")
    cases = _cases(here, arguments)
    shared = [] if arguments.batch_tokens is None else ["--batch-tokens", str(arguments.batch_tokens)]
    words = [sys.executable, "-m", "minillm", "serve", arguments.model, "--port", "0", "--device", "cpu", *shared]
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        if " at http" not in line:
            raise UserError(f"the server did not start: {line.strip() or 'see above'}")
        url = line.split(" at ")[1].split(",")[0]
        clients, memory, passed = _load(url, server.pid, cases, arguments)
    finally:
        server.terminate()
        status = server.wait()
    lines = _table(clients, memory, passed, arguments.seconds, status)
    show_page(lines, arguments.output, {**describe("cpu"), **_about(arguments)})
    problems = [one.problem for one in clients if one.problem]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems or status else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm bench serve", description=__doc__.partition("\n\n")[0])
    parser.add_argument("model", metavar="MODEL", help="as `minillm serve` takes it")
    parser.add_argument("--clients", type=int, default=8, help="at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=4, help="of a request (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of a text at most (default: %(default)s)")
    parser.add_argument("--batch-tokens", type=int, help="of the server: share passes up to so many positions")
    parser.add_argument("--output", metavar="MD", help="write the table")
    return parser


@dataclass(frozen=True)
class Case:
    """A request and what the model says to it here."""

    request: RowsRequest | SampleRequest
    expected: torch.Tensor | list[list[int]]


def _cases(here: ServedModel, arguments: argparse.Namespace, count: int = 48) -> list[Case]:
    """Requests of many shapes; every SAMPLED_EVERY-th is for answers."""
    draw = torch.Generator().manual_seed(0)
    cases = []
    for number in range(count):
        lengths = torch.randint(2, arguments.tokens // 2 + 1, (arguments.texts, 2), generator=draw).tolist()
        texts = [[torch.randint(0, here.ids, (size,), generator=draw).tolist() for size in both] for both in lengths]
        if number % SAMPLED_EVERY == SAMPLED_EVERY - 1:
            request = SampleRequest(
                [prompt for prompt, _ in texts], list(range(len(texts))), number, 0,
                {"max_new_tokens": 8}, list(here.described["end_ids"]), 0, here.teacher.vocab_size,
            )  # fmt: skip
            cases.append(Case(request, [ids for ids, _, _ in unpack_answers(load(here.sample(request)))]))
        else:
            request = RowsRequest(tuple(TokenSequence(*both) for both in texts))
            cases.append(Case(request, load(here.rows([request])[0])["hidden"]))
    return cases


def _load(
    url: str, process: int, cases: Sequence[Case], arguments: argparse.Namespace
) -> tuple[list[Client], list[float], dict[str, float]]:
    """The clients after their time, the server's resident memory in MiB along it, and its counts."""
    clients = [Client(number) for number in range(arguments.clients)]
    teachers = [
        ServedTeacher(ServedTeacherConfig(type="served", url=url), torch.device("cpu")) for _ in range(len(clients))
    ]
    end = time.monotonic() + arguments.seconds
    exact = arguments.batch_tokens is None
    threads = [
        threading.Thread(target=_ask, args=(client, teacher, cases, end, exact))
        for client, teacher in zip(clients, teachers, strict=True)
    ]
    for thread in threads:
        thread.start()
    memory = []
    while any(thread.is_alive() for thread in threads):
        memory.append(_resident_mib(process))
        time.sleep(min(0.5, arguments.seconds / 40))
    for thread in threads:
        thread.join()
    counted = {}
    for line in teachers[0].pool.request("GET", "/metrics").decode().splitlines():
        if not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            counted[name] = float(value)
    for teacher in teachers:
        teacher.close()
    return clients, memory, counted


def _ask(client: Client, teacher: ServedTeacher, cases: Sequence[Case], end: float, exact: bool) -> None:
    """Ask until the time is over, in an order of the client's own, and compare every answer."""
    order = torch.Generator().manual_seed(client.number)
    while time.monotonic() < end and client.problem is None:
        number = int(torch.randint(len(cases), (), generator=order))
        case, started = cases[number], time.perf_counter()
        try:
            if isinstance(case.request, SampleRequest):
                right = [ids for ids, _, _ in next(teacher.sample([case.request]))] == case.expected
            else:
                found = teacher.rows(collate(case.request.sequences, 0)).wait().hidden
                client.rows += len(found)
                right = torch.equal(found, case.expected) if exact else _is_close(found, case.expected)
        except UserError as error:
            client.problem = f"client {client.number}, request {number}: {error}"
            return
        client.seconds.append(time.perf_counter() - started)
        if not right:
            client.problem = f"client {client.number}, request {number}: another answer than the model's"


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:  # (N, H) each
    return bool(((found - expected).norm(dim=1) <= SHARED * expected.norm(dim=1)).all())


def _resident_mib(process: int) -> float:
    """Memory of a process, as Linux says it."""
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def _table(
    clients: Sequence[Client],
    memory: Sequence[float],
    counted: dict[str, float],
    wanted: float,
    status: int,
) -> list[str]:
    seconds = sorted(second for one in clients for second in one.seconds)
    answered, rows = len(seconds), sum(one.rows for one in clients)
    quantiles = statistics.quantiles(seconds, n=100) if answered > 1 else [float("nan")] * 99
    thirds = len(memory) // 3 or 1
    return [
        "| | |",
        "|---|--:|",
        f"| clients | {len(clients)} |",
        f"| seconds | {wanted:g} |",
        f"| requests answered | {answered:,} |",
        f"| answers that were not the model's, or lost | {sum(one.problem is not None for one in clients)} |",
        f"| rows a second | {rows / wanted:,.0f} |",
        f"| requests a pass | {counted['minillm_pass_requests_total'] / counted['minillm_passes_total']:.2f} |",
        f"| the model was busy | {counted['minillm_pass_seconds_total'] / wanted:.0%} |",
        f"| latency, median; 95%; 99% (ms) | {'; '.join(f'{1000 * quantiles[n]:,.0f}' for n in (49, 94, 98))} |",
        f"| server's memory, mean of the second third; of the last (MiB) | "
        f"{statistics.fmean(memory[thirds : 2 * thirds] or memory):,.1f}; {statistics.fmean(memory[-thirds:]):,.1f} |",
        f"| exit status of the server after SIGTERM | {status} |",
    ]


def _about(arguments: argparse.Namespace) -> dict[str, str]:
    shared = (
        "a pass for each request"
        if arguments.batch_tokens is None
        else f"passes up to {arguments.batch_tokens:,} positions"
    )
    return {
        "model": arguments.model,
        "request": f"{arguments.texts} texts of at most {arguments.tokens} tokens",
        "server": shared,
    }
