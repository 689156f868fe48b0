"""`minillm train` in processes that compute alike on every x86-64, with a look at what their optimisers hold.

Run as a program it is the parent of those processes: they are forked, so that what they import is imported once. Of
minillm it knows the command line alone.
"""

import gc
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

# Without the first four, the last bits of a sum depend on the CPU and on how many threads add it up.
PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TRITON_INTERPRET": "0",
}
IMPORTED = (
    "transformers.models.llama.modeling_llama", "transformers.optimization", "datasets", "matplotlib.figure",
    "rouge_score.rouge_scorer",
)  # fmt: skip
INTERRUPTED = 130


@dataclass(frozen=True)
class Train:
    """One run. Its optimiser's calls are counted from 1, over all stages; ZeRO-3 has one a step for each group of weights."""

    folder: str  # where it runs; what it prints is written to FOLDER/NAME-rank-R.txt
    name: str
    words: Sequence[str]  # of the command line, after `minillm train`
    ranks: int = 1
    looks: Sequence[int] = ()  # calls before which what the optimiser holds is added to FOLDER/NAME-rank-R.pt
    stop: int | None = None  # the call before which every rank sends `signal` to itself
    signal: int = signal.SIGKILL

    @property
    def status(self) -> int:
        """The exit status to expect."""
        return 0 if self.stop is None else INTERRUPTED if self.signal == signal.SIGINT else -self.signal


class Trains:
    """The parent process, on the minillm package in the folder `code`; `with` ends it."""

    def __init__(self, code: Path, environment: Mapping[str, str] = PORTABLE):
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **environment, "PYTHONPATH": str(code)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> "Trains":
        return self

    def __exit__(self, *exception) -> None:
        self._process.communicate()

    def train(self, run: Train) -> None:
        """Wait for a run. Raises ChildProcessError where it ends in another way than it was asked to."""
        self._process.stdin.write(json.dumps(asdict(run)) + "\n")
        self._process.stdin.flush()
        problem = json.loads(self._process.stdout.readline())
        if problem is not None:
            raise ChildProcessError(problem)


def main() -> None:
    for name in IMPORTED:
        import_module(name)
    gc.freeze()  # DeepSpeed collects for every engine that it makes
    for line in sys.stdin:
        print(json.dumps(_train(Train(**json.loads(line)))), flush=True)


def _train(run: Train) -> str | None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(run, rank, port)) for rank in range(run.ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    for rank, process in enumerate(ranks):
        if process.exitcode != run.status:
            return f"{run.name}: exit status {process.exitcode}\n{_output(run, rank).read_text()[-5000:]}"
    return None


def _rank(run: Train, rank: int, port: int) -> None:
    with _output(run, rank).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(run.folder)
    if run.ranks > 1:
        os.environ |= {"WORLD_SIZE": str(run.ranks), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    _hook(run, rank)
    # pictures take longer than these steps, and are no part of what a run goes on from
    import_module("matplotlib.figure").Figure.savefig = lambda figure, path, **options: Path(path).touch()
    sys.argv = ["minillm", "train", *run.words]
    runpy.run_module("minillm", run_name="__main__", alter_sys=True)


def _hook(run: Train, rank: int) -> None:
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    calls, seen = 0, {"weights": [], "moments": []}

    def before(optimizer, args, kwargs) -> None:
        nonlocal calls
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        if not any(weight.grad is not None and weight.grad.any() for weight in weights):
            return  # DeepSpeed's own, which makes room for the moments
        calls += 1
        if calls in run.looks:
            seen["weights"] += [weight.detach().clone() for weight in weights]
            seen["moments"] += [
                {name: one.clone() for name, one in optimizer.state[weight].items()} for weight in weights
            ]
            seen["groups"] = [{**group, "params": None} for group in optimizer.param_groups]
            seen["cpu_rng"] = torch.get_rng_state()
            torch.save(seen, f"{run.name}-rank-{rank}.pt")
        if calls == run.stop:
            os.kill(os.getpid(), run.signal)

    register_optimizer_step_pre_hook(before)


def _output(run: Train, rank: int) -> Path:
    return Path(run.folder) / f"{run.name}-rank-{rank}.txt"


if __name__ == "__main__":
    main()
