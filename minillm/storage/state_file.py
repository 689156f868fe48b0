"""Files of a checkpoint that hold state: written to the disk; errors of reading one name the file, and say what to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from minillm import UserError
from minillm.storage.atomic import sync
from minillm.storage.snapshot import SavedPart

_REASON = 200  # characters of another library's message


def torch_file(name: str, collect: Callable[[], Any]) -> SavedPart:
    """A part of state/ that torch.save writes into one file. An empty state has none."""

    def write(state: Any, folder: Path) -> None:
        if state:
            torch.save(state, folder / name)
            sync(folder / name)

    return SavedPart(collect, write)


@contextmanager
def reading_state(path: Path) -> Iterator[None]:
    """Read `path`, which is CHECKPOINT/state/NAME, inside: whatever fails there is raised as a UserError of that file.

    The checksums of the checkpoint agree by then: it is the content that is of another run, of another version, or was
    changed by hand.
    """
    try:
        yield
    except Exception as error:  # libraries raise all sorts for content that they do not expect
        raise UserError(
            f"{path}: {_reason(error)}. It is not what this run has written; remove {path.parent.parent.name} to go on "
            "from the checkpoint before it"
        ) from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file is missing"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:_REASON]}".rstrip(": ").rstrip(".")
