"""The prompts that the teacher of a stage read with a context of its own, beside those that the student read, and whom
evaluations compare the student with."""

import json
from pathlib import Path

from minillm import UserError
from minillm.data.teacher_context import SUMMARY
from minillm.reporting.markdown import cell, table
from minillm.reporting.run_files import RunFiles


def context_sections(run: RunFiles) -> list[str]:
    """The sections of a run's report on its stages whose teacher was told more than the student.

    Raises UserError where the file of a stage cannot be read.
    """
    paths = {name: run.folder / "written" / name / SUMMARY for name in run.stages}
    return [
        _section(name, path, run.stages[name].settings.get("eval", {}).get("sets") or {})
        for name, path in paths.items()
        if path.is_file()
    ]


def _section(stage: str, path: Path, sets: dict[str, dict]) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; `minillm train --resume` writes it anew") from error
    rows = [[cell(one["student"], limit=400), cell(one["teacher"], limit=800)] for one in found["samples"]]
    told = [name for name, keys in sets.items() if keys.get("teacher_context") is not None]
    untold = [name for name in sets if name not in told]
    parts = [
        f"## Told to the teacher alone in stage {stage}",
        f"In {found['with_context']:,} of {found['prompts']:,} prompts (`data.prompts.teacher_context`).",
        table(["the student reads", "the teacher reads"], rows, numbers=False),
    ]
    if told:
        parts.append(f"Divergences of {', '.join(told)} are from the teacher that reads the context of these prompts.")
    if untold:
        parts.append(f"Divergences of {', '.join(untold)} are from the teacher that reads the prompt of the student.")
    return "\n\n".join(parts)
