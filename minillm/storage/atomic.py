"""Files and folders that are whole or not there: written under another name, flushed to the disk, then renamed."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from minillm.distributed import collectives

_PARTIAL, _STALE = ".partial", ".stale"
ROOM = 2**20  # bytes; a disk that does not take as many more is full
FULL = {errno.ENOSPC, errno.EDQUOT}
_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")  # as libraries in Rust end their messages


def write_text(path: Path, text: str) -> None:
    """Replace a small file: a kill leaves the old content or the new."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """As `write_text`, for a file of another kind."""
    partial = path.with_name(f".{path.name}{_PARTIAL}")
    partial.write_bytes(content)
    sync(partial)
    partial.replace(path)


def write_folder(
    folder: Path, fill: Callable[[Path], None], *, sign: Callable[[Path], None] = lambda partial: None
) -> None:
    """Put what `fill` writes into an empty folder in the place of `folder`.

    All ranks call it, and each fills the same folder with files of its own; when all are done, rank 0 calls `sign` on
    it and puts it in place. A failure leaves what was there, and so does a kill once `clean` has run: between the two
    renames of a replacement the old folder bears another name. Raises OSError with ENOSPC where the disk is full,
    whatever the writer raises for that.
    """
    partial, stale = _beside(folder, _PARTIAL), _beside(folder, _STALE)

    def prepare() -> None:
        for leftover in (partial, stale):
            _delete(leftover)
        partial.mkdir(parents=True)

    def put() -> None:
        sign(partial)
        _put_in_place(folder, partial, stale)

    try:
        collectives.on_rank_0(prepare)
        fill(partial)
        collectives.barrier()
        collectives.on_rank_0(put)
    except Exception as error:
        _raise_if_full(folder.parent, error)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder, if there is one; what a kill leaves of it `clean` removes.

    Of a symbolic link only the link is removed.
    """
    if os.path.lexists(folder):
        partial = _beside(folder, _PARTIAL)
        _delete(partial)
        folder.rename(partial)
        _delete(partial)


def clean(parent: Path) -> None:
    """Delete partial writes in `parent`; restore a folder whose replacement never landed."""
    for stale in parent.glob(f".*{_STALE}"):
        folder = parent / stale.name[1 : -len(_STALE)]
        if os.path.lexists(folder):
            _delete(stale)
        else:
            stale.rename(folder)
    for partial in parent.glob(f".*{_PARTIAL}"):
        _delete(partial)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(folder: Path, partial: Path, stale: Path) -> None:
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    if os.path.lexists(folder):
        folder.rename(stale)
    partial.rename(folder)
    sync(folder.parent)
    _delete(stale)


def _delete(path: Path) -> None:
    """Delete a file, a folder or a symbolic link. What the system keeps of a folder is left for `clean`."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _raise_if_full(parent: Path, error: Exception) -> None:
    if _says_full(error) or not _has_room(parent):
        raise OSError(errno.ENOSPC, "no space left; what was saved before is whole", str(parent)) from error


def _says_full(error: BaseException | None) -> bool:
    """True where an error, or its cause, is the system's for a full disk or quota; some libraries say so in text alone."""
    while error is not None:
        numbers = {int(number) for number in _SYSTEM_ERROR.findall(str(error))}
        if FULL & {getattr(error, "errno", None), *numbers}:
            return True
        error = error.__cause__ or error.__context__
    return False


def _has_room(parent: Path) -> bool:
    """True where the disk takes ROOM bytes more: torch's writer does not say why it failed."""
    try:
        with tempfile.TemporaryFile(dir=parent) as probe:
            probe.write(bytes(ROOM))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.errno not in FULL
    return True


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}{ending}")
