"""Python programs as processes that are forked from one which has imported what they need.

Importing torch, transformers and DeepSpeed takes seconds, far more than the small runs of tests: the fork server of
`multiprocessing` does it once for all of them. What is about a launcher or an interpreter of its own starts one itself.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.preloaded"])


class Forked:
    """`python ARGUMENTS` in a process of its own, with an environment; ends with this process at the latest.

    It has the names of `subprocess.Popen`; stdout and stderr are one text.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]):
        handle, output = tempfile.mkstemp(prefix="forked-", suffix=".txt")
        os.close(handle)
        self._output = Path(output)
        self._process = _forks.Process(target=_program, args=(arguments, dict(environment), output), daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, or the negative number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait for the end; returns what was printed. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        self._process.join(timeout)
        printed = self._output.read_text()
        if self.returncode is None:
            self._process.kill()
            raise subprocess.TimeoutExpired(str(self.pid), timeout, printed)
        self._output.unlink()
        return printed, None


def run(
    command: Sequence[str], *, env: Mapping[str, str], timeout: float | None = None, **_
) -> subprocess.CompletedProcess:
    """`subprocess.run` for a command of this interpreter, whose own options do not count; stdout and stderr are one text."""
    how = next(place for place, word in enumerate(command) if word in ("-m", "-c"))
    process = Forked(command[how:], env)
    printed, _ = process.communicate(timeout)
    return subprocess.CompletedProcess(command, process.returncode, printed, printed)


def wait(child: int, seconds: float) -> int | None:
    """The exit status of a forked process that leads a group of its own; None where it takes longer, which ends the group."""
    deadline = time.monotonic() + seconds
    ended = False
    try:
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return None
    finally:  # its time is up, or this process is told to end
        if not ended:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _program(arguments: Sequence[str], environment: Mapping[str, str], output: str) -> None:
    import torch

    torch.set_num_threads(1)  # the server's own OMP_NUM_THREADS may have been another one
    os.environ.clear()
    os.environ.update(environment)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    how, *rest = arguments
    if how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = [how, *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = list(arguments)
        runpy.run_path(how, run_name="__main__")
