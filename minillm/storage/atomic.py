"""Files and folders that are whole or not there: written beside, flushed to the disk, renamed."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from minillm.distributed import collectives

_PARTIAL, _STALE = ".partial", ".stale"
ROOM = 2**20  # bytes; a disk with less is full


def write_text(path: Path, text: str) -> None:
    """Replace a small file whole."""
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    partial.replace(path)


def write_folder(
    folder: Path, fill: Callable[[Path], None], *, sign: Callable[[Path], None] = lambda partial: None
) -> None:
    """Put what `fill` writes into an empty folder in the place of `folder`.

    All ranks call it, and each fills the same folder with files of its own; when all are done, rank 0 calls `sign` on
    it and puts it in place. A failure of `fill` leaves what was there. So does a kill, once `clean` has run: between
    the two renames of a replacement the old folder lies beside, set aside.
    """
    partial, stale = _beside(folder, _PARTIAL), _beside(folder, _STALE)
    if collectives.rank() == 0:
        for leftover in (partial, stale):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    collectives.barrier()
    try:
        fill(partial)
    except Exception as error:
        _raise_if_full(folder.parent, error)
        raise
    collectives.barrier()
    if collectives.rank() == 0:
        sign(partial)
        _put_in_place(folder, partial, stale)
    collectives.barrier()


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there, whole or not at all: a kill leaves what `clean` removes."""
    if folder.exists():
        partial = _beside(folder, _PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        folder.rename(partial)
        shutil.rmtree(partial)


def _put_in_place(folder: Path, partial: Path, stale: Path) -> None:
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    if folder.exists():
        folder.rename(stale)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(stale, ignore_errors=True)


def _raise_if_full(parent: Path, error: Exception) -> None:
    """Say so where the disk is full; what writes weights has errors of its own for that."""
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or shutil.disk_usage(parent).free < ROOM:
        raise OSError(errno.ENOSPC, "no space left; what was saved before is whole", str(parent)) from error


def clean(parent: Path) -> None:
    """Remove what a kill left beside the files and folders of `parent`; what was set aside without successor returns."""
    for stale in parent.glob(f".*{_STALE}"):
        folder = parent / stale.name[1 : -len(_STALE)]
        if folder.exists():
            shutil.rmtree(stale)
        else:
            stale.rename(folder)
    for partial in parent.glob(f".*{_PARTIAL}"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}{ending}")
