"""The keys of every method: one file NAME_keys.py each, whose class KEYS has the literal NAME in `name`."""

from functools import reduce
from importlib import import_module
from operator import or_
from pkgutil import iter_modules
from typing import Annotated

from pydantic import Field

_FILES = sorted(module.name for module in iter_modules(__path__) if module.name.endswith("_keys"))
_CLASSES = [import_module(f"{__name__}.{file}").KEYS for file in _FILES]

Method = Annotated[reduce(or_, _CLASSES), Field(discriminator="name")]
