"""Complete runs in tests: training with a silent console, killing a child at a chosen moment, reading what is left."""

import json
import os
import signal
import traceback
from pathlib import Path

import pytest
import torch

TRAIN = ("-m", "minillm", "train")  # for another Python process
TWO_RANKS = ("engine.type=deepspeed", "train.gradient_accumulation_steps=1")  # of two steps in one process


class Silent:
    """A console that remembers its notes."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


def train(recipe: Path, *overrides: str, resume: bool = False) -> tuple[Path, Silent]:
    """Train as `minillm train` does; returns the folder final/ and the console with its notes."""
    from minillm.config.loader.run_plan import load_run
    from minillm.train.run import run

    console = Silent()
    return run(load_run([recipe], list(overrides)), resume=resume, console=console), console


def in_a_child(work) -> int:
    """Do `work` in a forked process; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        # torch makes a new pool of threads when one is first asked for after a fork; two threads that load a model and
        # ask at the same time find none
        torch.set_num_threads(1)
        try:
            work()
            status = 0
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def die_after(events: int) -> None:
    """SIGKILL this process at its n-th event: a decode or optimiser step, or a file synced, renamed or appended to."""
    from minillm.engine.torch import TorchEngine
    from minillm.rollout.local.decoder import Decoder
    from minillm.storage import atomic, metrics_log
    from minillm.storage.background import BackgroundWork

    left = [events]
    # which event is the n-th does not depend on how far a thread has come (tests/train/test_saver.py kills beside one)
    BackgroundWork.start = lambda self, work: work()

    def counted(function):
        def wrapper(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for owner, name in (
        (Decoder, "hidden"),
        (TorchEngine, "step"),
        (atomic, "sync"),
        (Path, "rename"),
        (Path, "replace"),
        (metrics_log.MetricsLog, "write"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def every_record(folder: Path) -> list[dict]:
    """All records of a run as they stand."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_clock(line: str) -> dict:
    """A record of metrics.jsonl without what depends on the machine's speed and memory."""
    clock = {"seconds", "tokens_per_s", "memory/peak_gib"}
    return {key: value for key, value in json.loads(line).items() if key not in clock and not key.startswith("time/")}


def records(folder: Path) -> list[dict]:
    """All records of a run, comparable with those of another one."""
    return [without_clock(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def panels(folder: Path) -> dict[str, list]:
    """The lines of the panels that a run's picture has, by their titles; the picture itself is not written."""
    from minillm.reporting import curves
    from minillm.reporting.run_files import read_run

    found = {}

    def keep(figure, path):
        titles = [(panel, panel.get_title(loc="left")) for panel in figure.axes]
        found.update({title: panel.lines for panel, title in titles if title})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "save", keep)
        curves.draw_run(read_run(folder), folder / "curves.png")
    return found
