"""The rationales and labels that a teacher has written for a stage: how many answers have none, and some of either kind."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm import UserError
from minillm.data.rationales import SUMMARY
from minillm.reporting.markdown import MISSING, cell, percentage, table

TITLES = {"labelled": "With a label", "unlabelled": "Without a label"}


def rationale_sections(folder: Path) -> list[str]:
    """The sections of a run's report on its stages whose teacher wrote rationales.

    Raises UserError where the file of a stage cannot be read.
    """
    return [_section(path.parent.name, _read(path)) for path in sorted(folder.glob(f"written/*/{SUMMARY}"))]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; `minillm train --resume` writes it anew") from error


def _section(stage: str, found: Mapping[str, Any]) -> str:
    total = found["answers"]
    told = (
        f"The teacher wrote {total:,} answers. The parser {found['parser']} finds no rationale in "
        f"{found['without_rationale']:,} of them ({percentage(found['without_rationale'] / total)}) and no label in "
        f"{found['without_label']:,} ({percentage(found['without_label'] / total)}); a record without one takes no part in "
        "the tasks that name it."
    )
    parts = [f"## Rationales written for stage {stage}", told]
    for kind, title in TITLES.items():
        rows = [
            [cell(one["question"], limit=200), cell(one["answer"], limit=300), cell(one["label"] or MISSING, limit=80)]
            for one in found["samples"][kind]
        ]
        if rows:
            parts.append(f"### {title}\n\n{table(['question', 'answer', 'label'], rows, numbers=False)}")
    return "\n\n".join(parts)
