"""A real disk of 4 MiB that fills while a checkpoint is written: it is called full, and nothing is lost.

Run as a program it fills the disk: FOLDER.
"""

import errno
import gc
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minillm.storage.atomic import clean
from minillm.storage.background import BackgroundWork
from minillm.storage.checkpoint import newest_whole, write_checkpoint

MIB = 2**20
# the disk is of one namespace of mounts, and gone with its last process
MOUNT = 'mount -t tmpfs -o size=4m tmpfs "$0" && exec "$@"'
WRITERS = {
    "safetensors": lambda path, tensors: save_file(tensors, path),
    "torch": lambda path, tensors: torch.save(tensors, path),
    "plain": lambda path, tensors: path.write_bytes(tensors["weights"].numpy().tobytes()),
}


def checkpoint(writer: str, size: int):
    def fill(folder: Path) -> None:
        (folder / "state").mkdir()
        (folder / "state" / "trainer.json").write_text("{}")
        WRITERS[writer](folder / "weights", {"weights": torch.zeros(size, dtype=torch.uint8)})

    return fill


def at_once(work: Callable[[], object]) -> None:
    work()


def in_background(work: Callable[[], object]) -> None:
    thread = BackgroundWork()
    thread.start(work)
    thread.finish()


def main(folder: Path) -> None:
    for step, (writer, do) in enumerate(product(WRITERS, (at_once, in_background)), 1):
        write_checkpoint(folder, step, checkpoint(writer, MIB // 2), keep=1)
        too_much = partial(write_checkpoint, folder, step + 1, checkpoint(writer, 16 * MIB), keep=1)
        with pytest.raises(OSError, match="no space left; what was saved before is whole") as caught:
            do(too_much)
        assert caught.value.errno == errno.ENOSPC
        del caught  # and with its frames torch's writer, which holds the file that it could not write
        gc.collect()
        clean(folder)
        assert newest_whole(folder, pytest.fail).name == f"checkpoint-{step}"
        assert [path.name for path in folder.iterdir()] == [f"checkpoint-{step}"]
        print(writer, do.__name__)


def test_a_disk_that_fills_loses_nothing(tmp_path):
    inside = ["unshare", "--mount", "sh", "-c", MOUNT, str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no disk of its own can be mounted here")
    result = subprocess.run([*inside, sys.executable, __file__, str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [
        word for writer in WRITERS for word in (writer, "at_once", writer, "in_background")
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
