"""Places that the command line names for results, looked at before the work whose results go there."""

import os
from pathlib import Path

from minillm import UserError
from minillm.config.checks.place_checks import folder_problem, name_problem


def require_file(option: str, path: Path | None) -> None:
    """Raise UserError where no file could be written to the path of an option. Its folder may be missing."""
    if path is None:
        return
    if os.path.isdir(path):
        raise UserError(f"{option}: {path} is a folder; name a file, such as {path / 'result'}")
    problem = name_problem(str(path)) or folder_problem(str(path.parent))
    if problem is None and os.path.exists(path) and not os.access(path, os.W_OK):
        problem = f"{path} may not be written to"
    if problem is not None:
        raise UserError(f"{option}: {problem}")


def require_folder(option: str, path: Path | None) -> None:
    """Raise UserError where no file could be written into the folder of an option. It may be missing."""
    problem = None if path is None else folder_problem(str(path))
    if problem is not None:
        raise UserError(f"{option}: {problem}")
