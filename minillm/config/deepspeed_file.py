"""A user's own DeepSpeed JSON: what the keys of `engine` do not say."""

import json
from typing import Any

from minillm import UserError
from minillm.config.paths import expand, matching_files


def read_deepspeed_file(text: str | None) -> dict[str, Any]:
    """The keys of the file that engine.config names; {} without one, and where no such file is there.

    Raises UserError where it is not a JSON object.
    """
    files = [] if text is None else matching_files(expand(text))
    if not files:
        return {}
    try:
        given = json.loads(files[0].read_text(encoding="utf-8"))
    except ValueError as problem:
        raise UserError(f"{files[0]} is not JSON: {problem}") from None
    if not isinstance(given, dict):
        raise UserError(f"{files[0]} is not a JSON object")
    return given
