"""Triton's interpreter at a fraction of the price: what it puts in the place of the language, it puts there once a launch.

It does so anew in every call of a jitted function within a kernel, each `tl.sum` among them, where all of it is in place
already; a kernel of a few dozen such calls spends most of its time on that.
"""

from types import FunctionType

import triton.language as tl
from triton.runtime import interpreter

_replace_language, _run = interpreter._patch_lang, interpreter.GridExecutor.__call__
_replaced: set[frozenset[str]] = set()  # modules of the language, as functions of this launch see them


def _replace_once(function: FunctionType) -> interpreter._LangPatchScope:
    seen = {id(value) for value in function.__globals__.values()}
    modules = frozenset(module.__name__ for module in (tl, tl.core) if id(module) in seen)
    if modules in _replaced:
        return interpreter._LangPatchScope()
    _replaced.add(modules)
    return _replace_language(function)


def _launch(self, *arguments, **options):
    _replaced.clear()
    try:
        return _run(self, *arguments, **options)
    finally:
        _replaced.clear()


interpreter._patch_lang, interpreter.GridExecutor.__call__ = _replace_once, _launch
