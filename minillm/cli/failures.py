"""The text and the exit status for an exception that ends a command.

Four kinds: an error for the person at the terminal (UserError), a package of the trainer that is not installed, a
failure of the machine (a full disk, a file that may not be written, no memory left), and everything else, which is a
defect of minillm and keeps its traceback.
"""

import errno
import re
import traceback
from collections.abc import Iterator, Sequence

import minillm
from minillm import UserError

STOPPED, INTERRUPTED = 1, 130
# Refusals of the system that a correct program may meet. Others, such as "no such file", may be a mistake of ours.
OF_THE_MACHINE = frozenset(
    getattr(errno, name)
    for name in (
        "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM EIO ENXIO ENODEV ESTALE EREMOTEIO ENOMEM EMFILE ENFILE EAGAIN EBUSY "
        "ETXTBSY ELOOP ENAMETOOLONG ENOLCK"
    ).split()
    if hasattr(errno, name)
)
# The way to go on after an interruption, or once the machine is right again.
CONTINUE = {
    "train": "--resume goes on from the last checkpoint",
    "experiment": "the same command goes on",
    "cache": "the same command goes on",
}

# What the extra `train` installs, {name to import: name to install}: a verb may find any of them missing.
TRAINER_PACKAGES = {
    name: name
    for name in "numpy transformers safetensors pydantic jinja2 rich datasets matplotlib tensorboard urllib3".split()
} | {"yaml": "pyyaml", "rouge_score": "rouge-score", "PIL": "pillow"}


def describe(error: BaseException, argv: Sequence[str]) -> tuple[str, int]:
    """(text for stderr, exit status) of an exception that ended the command `argv`."""
    go_on = CONTINUE.get(argv[0] if argv else "", "")
    if isinstance(error, KeyboardInterrupt):
        return _line(f"interrupted; {go_on}" if go_on else "interrupted"), INTERRUPTED
    if isinstance(error, UserError):
        return _line(str(error)), error.exit_status
    if isinstance(error, ModuleNotFoundError) and error.name in TRAINER_PACKAGES:
        verb = " ".join(["minillm", *argv[:1]])
        return _line(
            f"`{verb}` needs {TRAINER_PACKAGES[error.name]}, which is not installed: pip install -e '.[train]' in "
            "minillm's folder"
        ), UserError.exit_status
    refused = _machine_failure(error)
    if refused is not None:
        return _line(f"{refused}; set that right, and {go_on}" if go_on else refused), STOPPED
    return "".join(traceback.format_exception(error)) + _line(
        "this is a defect of minillm. Please report it with the traceback above, the command, its configuration "
        f"(config.yaml of the run), env.json beside it, and the version, {minillm.__version__}"
    ), STOPPED


def _line(text: str) -> str:
    """The text for the terminal, where characters that would control it are written out."""
    shown = "".join(one if one.isprintable() or one == "\n" else one.encode("unicode_escape").decode() for one in text)
    return f"minillm: {shown}\n"


def _machine_failure(error: BaseException) -> str | None:
    """The refusal of the machine that is the reason of `error`, in one line; else None."""
    for cause in _causes(error):
        text = " ".join(str(cause).split())
        if isinstance(cause, OSError) and cause.errno in OF_THE_MACHINE:
            return text
        written_in_rust = re.search(r"\(os error (\d+)\)", text)
        if written_in_rust and int(written_in_rust[1]) in OF_THE_MACHINE:
            return text
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError" or "CPUAllocator" in text:
            return f"out of memory{text and f' ({text})'}; `minillm plan` says what to change"
        if isinstance(cause, RuntimeError) and re.search(r"inline_container.*unexpected pos|PytorchStreamWriter", text):
            return f"torch could not write a file to its end ({text}); the disk is full, or has a quota"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception and those that it was raised from, with the one that interrupted torch while it wrote a file."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if (
            isinstance(error.__context__, OSError)
            and isinstance(error, RuntimeError)
            and "inline_container" in str(error)
        ):
            yield error.__context__  # torch.save to an open file
        yield error
        error = error.__cause__
