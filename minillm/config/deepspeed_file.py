"""A user's own DeepSpeed JSON, for settings that the keys of `engine` do not have."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minillm import UserError
from minillm.config.paths import expand, matching_files

SECTIONS = (
    ("bf16",),
    ("zero_optimization",),
    ("zero_optimization", "offload_optimizer"),
    ("zero_optimization", "offload_param"),
)


def read_deepspeed_file(text: str | None) -> dict[str, Any]:
    """The keys of the file that `engine.config` names; {} where none is named or none is there.

    Raises UserError where it is not a JSON object, or a section that minillm reads is not.
    """
    files = [] if text is None else matching_files(expand(text))
    if not files:
        return {}
    try:
        given = json.loads(files[0].read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise UserError(f"{files[0]} is not JSON: {problem}") from None
    if not isinstance(given, dict):
        raise UserError(f"{files[0]} is not a JSON object")
    for path in SECTIONS:
        _require_object(given, path, files[0])
    return given


def _require_object(given: Mapping[str, Any], path: tuple[str, ...], file: Path) -> None:
    section: Any = given
    for key in path:
        section = section.get(key, {})
    if not isinstance(section, dict):
        raise UserError(f"{file}: {'.'.join(path)} must be a JSON object, not {json.dumps(section)[:80]}")
