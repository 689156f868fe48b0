"""Checkpoints that are whole or not there, and prove it by their checksums.

checkpoint-N/            a Hugging Face folder of the student, and
  state/                 all else that is needed to go on: trainer.json, engine.pt, buffer.safetensors (one per rank)
  manifest.json          size and SHA-256 of every file, written last
"""

import re
from collections.abc import Callable
from pathlib import Path

from minillm.distributed import collectives
from minillm.storage.atomic import remove_folder, write_folder
from minillm.storage.manifest import find_damage, sign

TRAINER_STATE = "state/trainer.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def write_checkpoint(output_dir: Path, step: int, fill: Callable[[Path], None], *, keep: int) -> Path:
    """Write checkpoint-<step> through `fill`, which gets an empty folder, then remove all but the newest `keep`.

    A kill at any moment leaves either no folder of that name or a whole one; the older ones go only afterwards.
    Checkpoints of later steps stay: they are damaged ones, which were passed over, and which the run will replace.
    Of a checkpoint that is a symbolic link only the link is removed.
    """
    folder = output_dir / f"checkpoint-{step}"
    write_folder(folder, fill, sign=sign)

    def remove_older() -> None:
        so_far = [old for number, old in list_checkpoints(output_dir) if number <= step and old.is_dir()]
        for old in so_far[:-keep]:
            remove_folder(old)

    collectives.on_rank_0(remove_older)
    return folder


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of everything called checkpoint-N, oldest first, whole or not."""
    found = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def newest_whole(output_dir: Path, note: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that agrees with its manifest; `note` is told of each one passed over."""
    for _, folder in reversed(list_checkpoints(output_dir)):
        damage = find_damage(folder, requires=(TRAINER_STATE,))
        if damage is None:
            return folder
        note(f"{folder.name} is not whole ({damage}); going back to the one before")
    return None
