"""Checkpoints that are whole or not there, and prove it by their checksums.

checkpoint-N/            a Hugging Face folder of the student, and
  state/                 everything else needed to go on: trainer.json, engine.pt, buffer.safetensors (a file a rank)
  manifest.json          size and SHA-256 of every file, written last
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from minillm.distributed import collectives
from minillm.storage.atomic import write_folder

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_checkpoint(output_dir: Path, step: int, fill: Callable[[Path], None], *, keep: int) -> Path:
    """Write checkpoint-<step> through `fill`, which gets an empty folder, then drop all but it and the newest before it.

    `keep` stay. A kill at any moment leaves either no folder of that name or a whole one; the older ones go only
    afterwards. Of later steps there are only damaged ones, which were passed over, and which the run will replace.
    """
    folder = output_dir / f"checkpoint-{step}"

    write_folder(folder, fill, sign=sign)
    if collectives.rank() == 0:
        so_far = [old for number, old in list_checkpoints(output_dir) if number <= step]
        for old in so_far[:-keep]:
            shutil.rmtree(old)
    return folder


def sign(folder: Path) -> None:
    """Write the manifest of what is in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): _fingerprint(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint-N, oldest first, whole or not."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def newest_whole(output_dir: Path, note: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is what its manifest says; `note` hears of each one passed over."""
    for _, folder in reversed(list_checkpoints(output_dir)):
        damage = find_damage(folder)
        if damage is None:
            return folder
        note(f"{folder.name} is not whole ({damage}); going back to the one before")
    return None


def find_damage(folder: Path) -> str | None:
    """What is wrong with a signed folder, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except ValueError:
        return f"{MANIFEST} cannot be read"
    for name, expected in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _fingerprint(path) != expected:
            return f"{name} was altered"
    return None


def _fingerprint(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}
