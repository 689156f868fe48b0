"""Stages that take no step: what they leave in stages/NAME, and how a run that goes on knows that it is there."""

import json
from pathlib import Path

from minillm import UserError
from minillm.config.loader.run_plan import Stage
from minillm.reporting.run_files import PREPARED
from minillm.storage.manifest import find_damage


def mark_prepared(stage: Stage, folder: Path) -> None:
    """Say in the folder of a result which configuration it was made by."""
    content = {"stage": stage.name, "config": stage.config.model_dump(mode="json")}
    (folder / PREPARED).write_text(json.dumps(content, indent=1), encoding="utf-8")


def is_prepared(stage: Stage, output_dir: Path) -> bool:
    """True where the stage's result is there. A cache of a teacher's rows grows: where its data has changed, it is not.

    Raises UserError where it is damaged, or was made by another configuration.
    """
    grows = stage.config.method.needs().result == "rows"
    folder = output_dir / "stages" / stage.name
    if not (folder / PREPARED).is_file():
        return False
    # rows prove themselves as they are read, and may be more than are read in an hour
    damage = find_damage(folder, contents=lambda name: not (grows and name.startswith("rows-")))
    if damage is not None:
        raise UserError(f"{folder} is not whole ({damage}); delete it to have the stage done anew")
    before = json.loads((folder / PREPARED).read_text(encoding="utf-8"))["config"]
    now = stage.config.model_dump(mode="json")
    changed = [
        key for key in ("seed", "teacher", "student", "data", "rollout", "method") if before.get(key) != now[key]
    ]
    if changed == ["data"] and grows:
        return False
    if changed:
        raise UserError(
            f"stage {stage.name!r} has left {folder} under another {', '.join(changed)}; undo the change, or delete that "
            "folder and what later stages have made of it"
        )
    return True


def has_no_model(folder: Path) -> bool:
    """True for a folder below stages/ that is the result of a stage that trained nothing."""
    return (folder / PREPARED).is_file()
