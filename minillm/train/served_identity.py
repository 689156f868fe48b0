"""The check that a stage which goes on has the served teacher that it began with, wherever that is served by now."""

import json
from pathlib import Path

from minillm import UserError
from minillm.config.loader.run_plan import Stage
from minillm.storage.atomic import write_text
from minillm.teachers.remote import RemoteTeacher
from minillm.teachers.several import members
from minillm.teachers.teacher import Teacher

IDENTITY = "served_teacher.json"  # in written/NAME; of several teachers served_teacher-TEACHER.json


def require_same_served(teacher: Teacher | None, stage: Stage, output_dir: Path, *, resumed: bool) -> None:
    """Write down which models are served to a stage that begins. One process calls it.

    Raises UserError where a stage that is `resumed` began with other weights.
    """
    for name, one in members(teacher).items():
        if isinstance(one, RemoteTeacher):
            file = IDENTITY if name is None else f"{Path(IDENTITY).stem}-{name}.json"
            _require_same(one, stage, output_dir / "written" / stage.name / file, resumed=resumed)


def _require_same(teacher: RemoteTeacher, stage: Stage, path: Path, *, resumed: bool) -> None:
    now = teacher.identity
    if not resumed or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(now, indent=1))
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    difference = teacher.difference(before)
    if difference is not None:
        began, found = (" in ".join(one[key] for key in ("model", "dtype") if key in one) for one in (before, now))
        raise UserError(
            f"stage {stage.name!r} began with {began} as its teacher, and what is served now, {found}, {difference}: serve "
            "the former again, or start a new run in another output_dir"
        )
