"""The command line: `minillm train run.yaml`. Every verb imports what it needs when it runs.

Exit status: 0 done, 1 a run that had to stop, 2 something to correct in what was given, 130 interrupted.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

from minillm import UserError
from minillm.cli.arguments import BENCHMARKS, parse, split
from minillm.cli.failures import STOPPED, describe
from minillm.distributed.launcher import end, without_local_rank
from minillm.storage.background import is_at_work

# transformers imports bitsandbytes where peft is; on some CPUs that warns of kernels which only quantised teachers use
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end this process with its exit status."""
    status = main(argv)
    end(status, at_once=is_at_work())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status. `argv` are the words after `minillm`, by default this process's."""
    argv = without_local_rank(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(argv)
        sys.stdout.flush()  # here, where a full disk or a closed pipe still ends in a message and a status
        return status
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        _discard_output()
        return STOPPED
    except (Exception, KeyboardInterrupt) as error:
        text, status = describe(error, argv)
        if isinstance(error, OSError):  # perhaps of this very output, which would be written again at exit
            _discard_output()
        print(text, end="", file=sys.stderr)
        return status


def _run(argv: Sequence[str]) -> int:
    if argv[:1] == ["bench"] and argv[1:2] and argv[1] in BENCHMARKS:  # its options are its own
        return import_module(f"minillm.benchmarks.{argv[1]}").main(argv[2:]) or 0
    arguments = parse(argv)
    verb = VERBS.get(arguments.verb) or import_module(f"minillm.cli.{arguments.verb}").run
    return verb(arguments)


def _discard_output() -> None:
    """Send what is left to print nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # an output that is no file
        pass


def _validate(arguments: argparse.Namespace) -> int:
    from minillm.config.loader.run_plan import load_run, resolved
    from minillm.config.loader.yaml_text import dump

    print(dump(resolved(load_run(*split(arguments.words)))), end="")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from minillm.cli.outputs import require_file
    from minillm.reporting.report import compare_reports, write_report

    if len(arguments.runs) == 1:
        if arguments.figure is not None:
            raise UserError("--figure draws the curves of several runs; one run has its own in curves.png")
        print(write_report(arguments.runs[0]))
    else:
        require_file("--figure", arguments.figure)
        print(compare_reports(arguments.runs, figure=arguments.figure), end="")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    import json

    from minillm.config.loader.schema import file_schema

    print(json.dumps(file_schema(), indent=2))
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    from minillm.cli.cache_writing import run  # the method's file has the verb's name

    return run(arguments)


# Verbs of a few lines; every other one is `run` of the module of its name.
VERBS: dict[str, Callable[[argparse.Namespace], int]] = {
    "validate": _validate,
    "cache": _cache,
    "report": _report,
    "schema": _schema,
}


if __name__ == "__main__":
    program()
