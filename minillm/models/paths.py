"""Where a model's path leads: a folder, a hub name, a .gguf file, a file of an installed package, an earlier stage."""

import os
from importlib.util import find_spec
from pathlib import Path

PACKAGE, STAGE = "package:", "stage:"


def resolve_path(text: str, output_dir: Path) -> Path | str:
    """A local path where `text` names one, else `text` itself: a hub name.

    `package:NAME/FILE` is a file inside an installed Python package, found without importing it; `package:NAME/*.gguf`
    may use a pattern. `stage:NAME` is the model that an earlier stage of the run left.
    Raises FileNotFoundError where a package, a file in it, or a stage is missing.
    """
    if text.startswith(STAGE):
        folder = Path(output_dir) / "stages" / text.removeprefix(STAGE)
        if not folder.is_dir():
            raise FileNotFoundError(f"{text}: {folder} is not there; the stage has not finished")
        return folder
    if text.startswith(PACKAGE):
        return _in_package(text)
    path = Path(os.path.expandvars(text)).expanduser()
    return path if path.exists() else text


def hub_arguments(text: str, output_dir: Path, revision: str | None = None) -> tuple[Path | str, dict[str, str]]:
    """What from_pretrained takes for a path: the place, and gguf_file or revision where there is one.

    `revision` counts for hub names alone. Raises FileNotFoundError as resolve_path does.
    """
    where = resolve_path(text, output_dir)
    if not isinstance(where, Path):
        return where, {} if revision is None else {"revision": revision}
    if where.suffix == ".gguf":
        return where.parent, {"gguf_file": where.name}
    return where, {}


def _in_package(text: str) -> Path:
    name, _, pattern = text.removeprefix(PACKAGE).partition("/")
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{text}: the package {name} is not installed; pip install {name.replace('_', '-')}")
    for root in spec.submodule_search_locations:
        found = sorted(Path(root).glob(pattern)) if pattern else [Path(root)]
        if found:
            return found[0]
    raise FileNotFoundError(f"{text}: the package {name} is installed, but holds no {pattern}")
