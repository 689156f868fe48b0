"""Triton's interpreter at a fraction of the price: what it puts in the place of the language, it puts there once a launch.

It does so anew in every call of a jitted function within a kernel, each `tl.sum` among them, where all of it is in place
already; a kernel of a few dozen such calls spends most of its time on that.
"""

import warnings
from types import FunctionType, ModuleType

import triton
import triton.language as tl

NEEDED = ("_patch_lang", "_LangPatchScope", "GridExecutor")  # of the interpreter, whose own they are


def quicken(interpreter: ModuleType) -> bool:
    """Let launches replace the language once. An interpreter without what that takes stays as it is, with a warning."""
    missing = [name for name in NEEDED if not hasattr(interpreter, name)]
    if missing:
        warnings.warn(
            f"the interpreter of triton {triton.__version__} has no {', '.join(missing)}: it stays as it is, and tests under "
            "it take longer",
            stacklevel=2,
        )
        return False
    replace_language, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[frozenset[str]] = set()  # modules of the language, as functions of this launch see them

    def replace_once(function: FunctionType) -> object:
        seen = {id(value) for value in function.__globals__.values()}
        modules = frozenset(module.__name__ for module in (tl, tl.core) if id(module) in seen)
        if modules in replaced:
            return interpreter._LangPatchScope()
        replaced.add(modules)
        return replace_language(function)

    def launch(self, *arguments, **options):
        replaced.clear()
        try:
            return run(self, *arguments, **options)
        finally:
            replaced.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, launch
    return True
