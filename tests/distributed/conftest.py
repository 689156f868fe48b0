"""Ranks as processes of this machine, without a launcher, which would end the others where one is killed."""

import os
import socket
from pathlib import Path

import pytest

from tests.forked import Forked
from tests.runs import TRAIN, TWO_RANKS


@pytest.fixture(scope="session")
def start():
    """A function that starts `python ARGUMENTS` on a number of ranks."""

    def start(ranks: int, *arguments: str) -> list[Forked]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        places = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {} for rank in range(ranks)]
        return [Forked(arguments, {**os.environ, **place}) for place in places]

    return start


@pytest.fixture(scope="session")
def finish():
    """A function that waits for ranks to end well and returns what they printed."""

    def finish(processes: list[Forked], *, timeout: float = 180) -> list[str]:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output[-3000:]
        return outputs

    return finish


@pytest.fixture(scope="module")
def unbroken(request, recipe, start, finish) -> dict[str, Path]:
    """The folders of the module's recipe: trained by `one` process, and on two ranks in each of the module's ways, HOW."""
    how = request.module.HOW
    folders = {name: recipe.parent / name for name in ("one", *how)}
    finish(start(1, *TRAIN, str(recipe), f"output_dir={folders['one']}"))
    for name, keys in how.items():
        finish(start(2, *TRAIN, str(recipe), f"output_dir={folders[name]}", *TWO_RANKS, *keys))
    return folders
