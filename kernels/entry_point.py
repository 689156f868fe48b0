"""Common to all functions of the door: options as declared, and a refusal of the transforms of torch that none takes."""

import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import TypeVar, get_args

import torch

from minillm.kernels.compiling import is_recorded, outside_compiled_graphs
from minillm.kernels.options import Option, declared

F = TypeVar("F", bound=Callable)

# By name: the functions in terms of operators, and why a call with some options can be none.
recorded: dict[str, Callable] = {}
refusals: list[Callable[[dict], str | None]] = []


def entry_point(function: F) -> F:
    """`function(..., **options: Unpack[...])` with the declared options in its signature, docstring and calls.

    The function gets every option, given or not; an unknown keyword is a TypeError that names the nearest. Where calls are
    recorded (torch.compile and its kind), the function of that name in `recorded` takes its place. The transforms of torch.func
    raise a RuntimeError.
    """
    own = inspect.signature(function)
    *parameters, options = own.parameters.values()
    options = declared(get_args(options.annotation)[0])
    defaults = {name: option.default for name, (_, option) in options.items()}
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=hint)
        for name, (hint, option) in options.items()
    ]
    names = [parameter.name for parameter in parameters]

    @functools.wraps(function)
    def entry(*args, **given):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise TypeError(f"{function.__name__}() has no argument {unknown[0]!r}; {_suggestion(unknown[0], names)}")
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{function.__name__} does not support torch.func.grad, vmap and their kind; call it on plain tensors, "
                "with all rows in the leading dimensions, and take its gradient by backward() or torch.autograd.grad"
            )
        given = {**defaults, **given}
        if function.__name__ in recorded and is_recorded():
            reason = next((reason for refusal in refusals if (reason := refusal(given))), None)
            if reason is None:
                return recorded[function.__name__](*args, **given)
            return outside_compiled_graphs(function, reason)(*args, **given)
        return function(*args, **given)

    entry.__signature__ = own.replace(parameters=parameters)
    if function.__doc__:  # none under python -OO
        entry.__doc__ = _documented(function.__doc__, {name: option for name, (_, option) in options.items()})
    return entry


def _suggestion(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1) or [known for known in names if known.startswith(name)]
    return f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"


def _documented(text: str, options: dict[str, Option]) -> str:
    """The docstring with a section on its options, before what it says of errors."""
    lines = ["Options:"]
    for name, option in options.items():
        entry = f"{name}: {option.meaning}. Default: {option.default!r}."
        lines += textwrap.wrap(entry, 110, initial_indent="    ", subsequent_indent="        ")
    section = textwrap.indent("\n".join(lines), "    ")
    body, raises, errors = text.rstrip().partition("\n\n    Raises:")
    return f"{body}\n\n{section}{raises}{errors}\n    "
