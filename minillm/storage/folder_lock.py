"""The lock on a run's folder: one process at a time writes in it, and the system releases it when that process ends.

It is an advisory lock of the system on the file .lock, not the presence of that file: a process that is killed leaves
the file behind, and nothing to clear away. The file says who holds the lock. Network disks that pass locks on to their
server (NFS, Lustre mounted with `flock`, GPFS) keep out processes of other hosts as well.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from minillm import UserError
from minillm.storage.background import wait_for_all

LOCK = ".lock"
_HELD_ELSEWHERE = {errno.EWOULDBLOCK, errno.EACCES}
_held: dict[Path, int] = {}  # folders that this process holds, with the open descriptors of their lock files


class FolderInUseError(UserError):
    """A folder that another process writes to."""


@contextmanager
def hold_folder(folder: Path, *, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock on a folder, made where it is not there. A process may hold a folder that it holds already.

    `note` is told where the disk has no locks, so that nothing keeps a second process out. Raises FolderInUseError,
    saying by whom and since when, before anything in the folder is touched; UserError where it cannot be written to.
    """
    key = folder.resolve()
    if key in _held:
        yield
        return
    wait_for_all()  # an earlier run of this process, left at once, may still write here what this one goes on from
    _held[key] = _take(folder, note)
    try:
        yield
    finally:
        if key in _held:  # not in a process that was forked since
            descriptor = _held.pop(key)
            _write(descriptor, b"")
            os.close(descriptor)


def _take(folder: Path, note: Callable[[str], None]) -> int:
    """The descriptor of the lock file, locked."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error}; choose another output_dir") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise FolderInUseError(
                f"{folder} is in use: {holder}. Wait for its end, or choose another output_dir"
            ) from None
        note(f"the disk of {folder} has no locks ({error.strerror}): start no second run in this folder")
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    _write(descriptor, json.dumps(holder).encode())
    return descriptor


def _write(descriptor: int, content: bytes) -> None:
    """Replace the name of the holder; on a full disk the lock holds without one."""
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, content, 0)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} has been writing to it since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # between its lock and its name, or by way of a slow server
        return "another process is writing to it"


def _leave_to_parent() -> None:
    """A forked process neither holds its parent's locks nor keeps them when the parent ends."""
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
