"""manifest.json: size and SHA-256 of every file of a folder, written last, by which damage is found.

Checkpoints, published models (stages/, best/, final/) and frozen weights carry one.
"""

import hashlib
import json
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
SETTLED_NS = 2 * 10**9  # a file that was written to later than this ago may change again within one tick of its clock
Stamp = tuple[str, int, int]  # path, bytes, time of the last change in ns
_known_hashes: dict[str, tuple[Stamp, str]] = {}  # of files that this process has read to the last byte


def sign(folder: Path) -> None:
    """Write the manifest of all files in the folder, in the place of one that it has."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    manifest = {str(path.relative_to(folder)): _fingerprint(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def is_signed(folder: Path) -> bool:
    """True where the folder has a manifest; published models of earlier versions have none."""
    return (folder / MANIFEST).exists()


def published_damage(folder: Path) -> str | None:
    """`find_damage` of a published model; None for one without a manifest, which an earlier version published."""
    return find_damage(folder) if is_signed(folder) else None


def model_damage(folder: Path) -> str | None:
    """`find_damage` of a model that somebody names by its folder, be it a checkpoint: of its own files, not of `state/`.

    None for a folder that no run has signed: one without a manifest, or with one of another kind.
    """
    if not is_signed(folder):
        return None
    try:
        if not _is_manifest(json.loads((folder / MANIFEST).read_text())):
            return None
    except (OSError, ValueError, RecursionError):
        pass  # which is said below
    return find_damage(folder, without="state/")


def find_damage(
    folder: Path,
    *,
    requires: Collection[str] = (),
    without: str | None = None,
    contents: Callable[[str], bool] = lambda name: True,
) -> str | None:
    """The first difference between a signed folder and its manifest, in words; None where there is none.

    Reads every file to its end, unless this process has done so before and the file has not changed since. Files that the
    manifest does not name are not looked at; it must name those that are required.

    Args:
        without: what names of files begin with that do not count.
        contents: true for the names of files that are read; of the others only the size is looked at.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except NotADirectoryError:
        return "it is a file, not a folder"
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if not _is_manifest(manifest):
        return f"{MANIFEST} does not give the size and SHA-256 of any file"
    for name in requires:
        if name not in manifest:
            return f"{MANIFEST} does not name {name}"
    try:
        counted = {name: one for name, one in manifest.items() if without is None or not name.startswith(without)}
        return _find_difference(folder, counted, contents)
    except OSError as error:  # of a failing disk
        return f"{error.filename or folder} cannot be read: {error.strerror}"


def _find_difference(folder: Path, manifest: dict[str, dict[str, Any]], contents: Callable[[str], bool]) -> str | None:
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
    for name, expected in manifest.items():
        if contents(name) and _hash(folder / name) != expected["sha256"]:
            return f"{name} was altered"
    return None


def _hash(path: Path) -> str:
    stamp = _stamp(path)
    before, known = _known_hashes.get(stamp[0], (None, ""))
    if before == stamp:
        return known
    found = _fingerprint(path)["sha256"]
    if stamp[2] < time.time_ns() - SETTLED_NS:
        _known_hashes[stamp[0]] = (stamp, found)
    return found


def _is_manifest(content: Any) -> bool:
    entries = list(content.values()) if isinstance(content, dict) else []
    return bool(entries) and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in entries
    )


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return str(path.resolve()), status.st_size, status.st_mtime_ns


def _fingerprint(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
