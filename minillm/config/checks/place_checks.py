"""Checks of paths: files, folders, hub names, files of packages, and results of earlier stages are there."""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from minillm import UserError
from minillm.config.checks.facts import Facts, Found
from minillm.config.keys import Place
from minillm.config.nearest import nearest
from minillm.config.needs import Result
from minillm.config.paths import (
    BYTE_TOKENIZER,
    CACHE,
    PACKAGE,
    STAGE,
    cache_folder,
    is_hub_name,
    matching_files,
    package_file,
    unset_variables,
)
from minillm.config.root import STAGE_SHAPE
from minillm.config.shape import places
from minillm.config.wording import show

NAME_MAX = 255  # bytes of one name, on all common file systems
PATH_MAX = 4096 - 256  # bytes of a path on Linux, with room for what a run writes below it
RESULTS: dict[Result, str] = {"model": "a model", "data": "data", "rows": "a cached teacher"}


def places_exist(facts: Facts) -> Iterator[Found]:
    """Every path of the stage leads somewhere."""
    for path, place, text in places(STAGE_SHAPE, facts.data):
        if path[0] == "data" and text.startswith(STAGE):
            problem = stage_problem(text, facts, leaves="data")
        else:
            problem = place_problem(place, text, facts)
        if problem is not None:
            yield Found(path, problem)


def place_problem(place: Place, text: str, facts: Facts) -> str | None:
    """The problem with an expanded path, or None. Hub names are not looked up."""
    unset = unset_variables(text)
    if unset:
        return f"the environment variable {unset[0]} is not set"
    if "\0" in text:
        return f"{show(text)} holds the character NUL, which no path may"
    if place.kind == "folder":
        return folder_problem(text)
    if place.kind == "rows":
        return _cache_problem(text, facts)
    if place.kind == "files":
        if os.path.isdir(text):
            return f"{text} is a folder; name a file in it, or a pattern such as {Path(text) / '*'}"
        return None if matching_files(text) else _not_there(text, "no file matches" if "*" in text else "no such file")
    if place.kind in ("model", "tokenizer"):
        if text.startswith(STAGE):
            return stage_problem(text, facts, leaves="model")
        if text.startswith(PACKAGE):
            return _package_problem(text)
        if place.kind == "tokenizer" and text == BYTE_TOKENIZER:
            return None
    if is_hub_name(text):
        return None
    if not os.path.exists(text):
        return _not_there(text, "no such folder")
    if place.kind == "model" and not text.endswith(".gguf") and not os.path.isfile(Path(text) / "config.json"):
        return (
            f"{text} is no model: expected a folder with a config.json, as save_pretrained writes it, or a .gguf file"
        )
    return None


def folder_problem(text: str) -> str | None:
    """The problem with a folder that is to be written to, and made where it is missing; or None."""
    if not text:
        return "must not be empty; . is the current folder"
    problem = name_problem(text)
    if problem is not None:
        return problem
    above = next(folder for folder in (Path(text), *Path(os.path.abspath(text)).parents) if os.path.lexists(folder))
    if not os.path.isdir(above):
        return f"{above} is a file, not a folder"
    return None if os.access(above, os.W_OK | os.X_OK) else f"{above} may not be written to"


def name_problem(text: str) -> str | None:
    """The problem with the name of a file or folder that is to be made, or None."""
    odd = [character for character in text if not character.isprintable()]
    if odd:
        return f"{show(text)} holds {odd[0]!r}, which commands and reports could not name; choose another name"
    longest = max(Path(text).parts, key=lambda part: len(part.encode()), default="")
    if len(longest.encode()) > NAME_MAX:
        return f"{show(longest)} has {len(longest.encode())} bytes; file systems take names of at most {NAME_MAX}"
    whole = len(os.path.abspath(text).encode())
    if whole > PATH_MAX:
        return f"the whole path has {whole} bytes, which leaves no room for the names of files below it"
    return None


def stage_problem(text: str, facts: Facts, *, leaves: Result | None = None) -> str | None:
    """The problem with stage:NAME, or None. Only a stage that runs before this one has left anything.

    `leaves` says what is taken from it: a model, which a stage leaves that trains; data or a teacher's rows, from one
    without steps.
    """
    name, earlier = text.removeprefix(STAGE), list(facts.earlier)
    if name in earlier:
        method = facts.earlier[name].groups.get("method")
        if method is None or leaves is None or method.needs().result == leaves:
            return None
        left, wanted = RESULTS[method.needs().result], RESULTS[leaves].removeprefix("a ")
        return f"stage {name!r} ({method.name}) leaves {left} and no {wanted}"
    if name == facts.name:
        return f"stage {name!r} is this one; a stage takes from those before it"
    if name in facts.all_stages:
        return f"stage {name!r} runs after this one; stages run in the order in which they are written"
    near = nearest(name, earlier)
    if near:
        hint = f"did you mean {near}?"
    else:
        hint = f"before this one: {', '.join(earlier)}" if earlier else "this is the first"
    return f"there is no stage {name!r} ({hint})"


def _cache_problem(text: str, facts: Facts) -> str | None:
    if text.startswith(STAGE):
        return stage_problem(text, facts, leaves="rows")
    if not os.path.exists(text):
        return _not_there(text, "no such folder")
    if cache_folder(text) is None:
        return f"{text} is no cache: expected a folder with a {CACHE}, as `minillm cache` writes it"
    return None


def _package_problem(text: str) -> str | None:
    try:
        package_file(text)
    except UserError as error:
        return str(error)
    return None


def _not_there(text: str, what: str) -> str:
    """The message for a path that leads nowhere, with the nearest name in the last of its folders that exists."""
    path = Path(text)
    present = next((folder for folder in path.parents if os.path.isdir(folder)), None)
    where = "" if path.is_absolute() else f" (from the current folder, {Path.cwd()})"
    if present is None or "*" in text:
        return f"{what}: {text}{where}"
    wanted = path.relative_to(present).parts[0]
    close = difflib.get_close_matches(wanted, [item.name for item in present.iterdir()], 1, 0.6)
    if close:
        return f"{what}: {text} (did you mean {present / close[0]}?)"
    missing_above = "" if present == path.parent else f"; there is no {present / wanted}"
    return f"{what}: {text}{missing_above}{where}"
