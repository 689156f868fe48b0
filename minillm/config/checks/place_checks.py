"""Whether what a path names is there: files, folders, hub names, files of packages, models of earlier stages."""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from minillm import UserError
from minillm.config.checks.facts import Facts, Found
from minillm.config.keys import Place
from minillm.config.nearest import nearest
from minillm.config.paths import (
    BYTE_TOKENIZER,
    PACKAGE,
    STAGE,
    is_hub_name,
    matching_files,
    package_file,
    unset_variables,
)
from minillm.config.root import STAGE_SHAPE
from minillm.config.shape import places


def places_exist(facts: Facts) -> Iterator[Found]:
    """Every path of the stage."""
    for path, place, text in places(STAGE_SHAPE, facts.data):
        problem = place_problem(place, text, facts)
        if problem is not None:
            yield Found(path, problem)


def place_problem(place: Place, text: str, facts: Facts) -> str | None:
    """What is wrong with an expanded path, None where it is fine. Hub names are not looked up."""
    unset = unset_variables(text)
    if unset:
        return f"the environment variable {unset[0]} is not set"
    if place.kind == "folder":
        return f"{text} is a file, not a folder" if os.path.isfile(text) else None
    if place.kind == "files":
        if os.path.isdir(text):
            return f"{text} is a folder; name a file in it, or a pattern such as {Path(text) / '*'}"
        return None if matching_files(text) else _not_there(text, "no file matches" if "*" in text else "no such file")
    if place.kind in ("model", "tokenizer"):
        if text.startswith(STAGE):
            return stage_problem(text, facts)
        if text.startswith(PACKAGE):
            return _package_problem(text)
        if place.kind == "tokenizer" and text == BYTE_TOKENIZER:
            return None
    if is_hub_name(text):
        return None
    if not os.path.exists(text):
        return _not_there(text, "no such folder")
    if place.kind == "model" and not text.endswith(".gguf") and not (Path(text) / "config.json").is_file():
        return (
            f"{text} is no model: expected a folder with a config.json, as save_pretrained writes it, or a .gguf file"
        )
    return None


def stage_problem(text: str, facts: Facts) -> str | None:
    """What is wrong with stage:NAME: only a stage that runs before this one has left anything."""
    name, earlier = text.removeprefix(STAGE), list(facts.earlier)
    if name in earlier:
        return None
    if name == facts.name:
        return f"stage {name!r} is this one; a stage takes from those before it"
    if name in facts.all_stages:
        return f"stage {name!r} runs after this one; stages run in the order in which they are written"
    near = nearest(name, earlier)
    hint = (
        f"did you mean {near}?"
        if near
        else f"before this one: {', '.join(earlier)}"
        if earlier
        else "this is the first"
    )
    return f"there is no stage {name!r} ({hint})"


def _package_problem(text: str) -> str | None:
    try:
        package_file(text)
    except UserError as error:
        return str(error)
    return None


def _not_there(text: str, what: str) -> str:
    """The message, with the nearest name in the last folder of the path that is there."""
    path = Path(text)
    present = next((folder for folder in path.parents if folder.is_dir()), None)
    where = "" if path.is_absolute() else f" (from the current folder, {Path.cwd()})"
    if present is None or "*" in text:
        return f"{what}: {text}{where}"
    wanted = path.relative_to(present).parts[0]
    close = difflib.get_close_matches(wanted, [item.name for item in present.iterdir()], 1, 0.6)
    if close:
        return f"{what}: {text} (did you mean {present / close[0]}?)"
    missing_above = "" if present == path.parent else f"; there is no {present / wanted}"
    return f"{what}: {text}{missing_above}{where}"
