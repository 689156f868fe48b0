"""Functions of the user's own that a key names: `package.module:function`, or `file.py:function`.

Naming one is the consent to run it: its module is imported where the configuration is checked, so that what is wrong with
it is said before any model is read.
"""

import inspect
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from zlib import crc32

from minillm import UserError
from minillm.config.nearest import nearest
from minillm.config.paths import expand

FORM = "package.module:function or file.py:function"


def load_function(text: str, *arguments: str) -> Callable[..., Any]:
    """The function that `text` names, which can be called with `arguments` by position.

    A module is found where Python finds modules. A file counts from the current folder and may hold `$VARIABLES` and `~`;
    it is run once in a process, whatever names it.

    Raises UserError, which says what to correct: a text of another form, a file that is not there, a module that cannot
    be imported, a name that is no function of it, or one that takes other arguments.
    """
    home, colon, name = text.rpartition(":")
    if not colon or not home or not name.isidentifier():
        raise UserError(f"{text!r} names no function; write {FORM}")
    module = _module_of_file(_existing_file(home)) if home.endswith(".py") else _module(home)
    function = getattr(module, name, None)
    if not callable(function):
        found = "is no function" if hasattr(module, name) else "is not there"
        meant = nearest(name, (key for key, value in vars(module).items() if inspect.isfunction(value)))
        raise UserError(f"{name} {found} in {home}" + (f" (did you mean {meant}?)" if meant else ""))
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as problem:
        called = f"{name}({', '.join(arguments)})"
        raise UserError(f"{text} is called as {called}, which it does not accept: {problem}") from None
    except ValueError:  # written in C, without a signature
        pass
    return function


def _existing_file(text: str) -> Path:
    path = Path(expand(text)).absolute()
    if not path.is_file():
        raise UserError(f"there is no file {path}; paths count from the current folder")
    return path


def _module(name: str) -> ModuleType:
    if not all(part.isidentifier() for part in name.split(".")):
        raise UserError(f"{name!r} is the name of no module; write {FORM}")
    try:
        return import_module(name)
    except ModuleNotFoundError as problem:
        raise UserError(f"{problem}; install it, or name a file: path/to/file.py:function") from problem
    except (Exception, SystemExit) as problem:  # a script may end itself
        raise UserError(_failed(name, problem)) from problem


@cache
def _module_of_file(path: Path) -> ModuleType:
    name = f"{path.stem}_{crc32(bytes(path)):08x}"  # never that of a module which is imported by its name
    spec = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and others look for it there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as problem:
        del sys.modules[name]
        raise UserError(_failed(str(path), problem)) from problem
    return module


def _failed(what: str, problem: BaseException) -> str:
    return f"{what} fails when it is imported: {type(problem).__name__}: {problem}"
