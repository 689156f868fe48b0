"""The meaning of a text that names a place: a local path, a hub name, a package's file or an earlier stage's result.

A text is a local path where it starts with `/`, `.` or `~`, ends in `.gguf`, has more than one `/`, exists, or begins
with a folder that exists. Anything else is a hub name (`name` or `organisation/name`), which is not looked up.
"""

import glob
import importlib.util
import os
import re
from pathlib import Path

from minillm import UserError

PACKAGE, STAGE, BYTE_TOKENIZER = "package:", "stage:", "byte"
CACHE = "cache.json"  # in the folder of a cached teacher
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def expand(text: str) -> str:
    """`$VAR`, `${VAR}` and a leading `~` replaced; a variable that is not set stays."""
    return os.path.expanduser(os.path.expandvars(text))


def unset_variables(text: str) -> list[str]:
    """The environment variables in an expanded text: those that are not set."""
    return [name.strip("{}") for name in _VARIABLE.findall(text)]


def is_hub_name(text: str) -> bool:
    """True for an expanded text that is a hub name, by the rule above."""
    if not _HUB_NAME.fullmatch(text) or text.startswith(".") or text.endswith(".gguf"):
        return False
    organisation, slash, _ = text.partition("/")
    return not os.path.exists(text) and not (slash and os.path.isdir(organisation))


def package_file(text: str) -> Path:
    """The file that package:NAME/FILE names: the first of an installed package that FILE, a name or a glob, matches.

    NAME is the name that Python imports. The package is looked for, not imported.

    Raises UserError, which says what to install, or which files there are.
    """
    name, _, file = text.removeprefix(PACKAGE).partition("/")
    if not name.isidentifier() or not file:
        raise UserError(f"{text!r} is not {PACKAGE}NAME/FILE with the name that Python imports")
    spec = importlib.util.find_spec(name)  # of a top-level name this runs nothing
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the Python package {name} is not installed: pip install --no-deps {name.replace('_', '-')}")
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    try:
        matching = [path for folder in folders for path in sorted(folder.glob(file)) if path.is_file()]
    except (ValueError, NotImplementedError, OSError) as error:  # no pattern, or one that leaves the package
        raise UserError(f"{text!r}: {file!r} names no file of a package ({error})") from None
    if not matching:
        alike = sorted(path.name for folder in folders for path in folder.glob(f"*{Path(file).suffix}"))
        has = f"; it has {', '.join(alike)}" if alike else ""
        raise UserError(f"the Python package {name} has no file {file}{has}")
    return matching[0]


def cache_folder(text: str) -> Path | None:
    """The folder of the cached teacher that an expanded path leads to: itself, or that of a run of one stage; else None."""
    folders = (Path(text), Path(text) / "stages" / "main")
    return next((folder for folder in folders if (folder / CACHE).is_file()), None)


def matching_files(pattern: str) -> list[Path]:
    """The file of that name, or the files that a glob matches, in order; [] where there are none."""
    if os.path.isfile(pattern):
        return [Path(pattern)]
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]
