"""The command line: `minillm train run.yaml`. Each verb is a small function; what it needs is imported when it runs.

Exit status: 0 done, 1 a run that had to stop, 2 something to correct in what was given, 130 interrupted.
"""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from minillm import UserError
from minillm.cli.arguments import BENCHMARKS, parse, split
from minillm.distributed.launcher import end, launched_rank, launched_size, without_local_rank

# transformers imports bitsandbytes where peft is; on some CPUs that warns of kernels which only quantised teachers use
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

STOPPED, WRONG_INPUT, INTERRUPTED = 1, 2, 130
# A full or read-only disk, or a file that may not be written: its message says which, and is no defect.
OF_THE_SYSTEM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end this process with its exit status."""
    end(main(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = without_local_rank(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["bench"] and argv[1:2] and argv[1] in BENCHMARKS:  # its options are its own
            return _bench(argv[1], argv[2:])
        arguments = parse(argv)
        return VERBS[arguments.verb](arguments)
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last checkpoint" if argv[:1] == ["train"] else ""
        hint = "; the same command goes on" if argv[:1] == ["experiment"] else hint
        print(f"minillm: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STOPPED
    except UserError as error:
        print(f"minillm: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        if error.errno not in OF_THE_SYSTEM:
            raise
        print(f"minillm: {error}", file=sys.stderr)
        return STOPPED


def _train(arguments: argparse.Namespace) -> int:
    from minillm.config.loader.run_plan import load_run

    plan = load_run(*split(arguments.words))
    if launched_size() > 1 and any(stage.config.engine.type == "torch" for stage in plan.stages):
        raise UserError(
            "engine.type torch is one process; start it without a launcher of several, or set engine.type=deepspeed"
        )
    folder = plan.output_dir
    first = launched_rank() == 0  # the others come to a folder that it may have begun to fill
    if first and not arguments.resume and folder.is_dir() and not _nothing_trained(folder):
        raise UserError(
            f"output_dir {folder} is not empty: add --resume to go on from its newest checkpoint, or choose another "
            "folder with output_dir=..."
        )
    from minillm.reporting.console import Console
    from minillm.train.run import run

    with Console() as console:
        run(plan, resume=arguments.resume, console=console)
    return 0


def _nothing_trained(output_dir: Path) -> bool:
    """Whether a folder is empty, or holds only what a run leaves that stopped before its first step or evaluation."""
    from minillm.storage.folder_lock import LOCK
    from minillm.storage.metrics_log import METRICS, SAMPLES

    names = {path.name for path in output_dir.iterdir()} - {LOCK}
    begun = {"config.yaml", "env.json", METRICS, SAMPLES}
    return not names or names == begun and (output_dir / METRICS).stat().st_size == 0


def _validate(arguments: argparse.Namespace) -> int:
    from minillm.config.loader.run_plan import load_run, resolved
    from minillm.config.loader.yaml_text import dump

    print(dump(resolved(load_run(*split(arguments.words)))), end="")
    return 0


def _experiment(arguments: argparse.Namespace) -> int:
    from minillm.experiment.experiment_file import chosen_arms, chosen_seeds, load_experiment, titles

    if not arguments.words:
        lines = [f"{name:20} {title}" for name, title in titles().items()]
        print("\n".join(lines) or "there are no experiments in configs/experiments here; name a .yaml file")
        return 0
    from minillm.config.paths import expand
    from minillm.experiment.experiment_report import write_experiment_report
    from minillm.experiment.jobs import commands
    from minillm.experiment.runner import run_experiment, train_together

    experiment = load_experiment(arguments.words[0], arguments.words[1:])
    seeds = chosen_seeds(experiment, arguments.seeds)
    arms = chosen_arms(experiment, arguments.arms)
    output = arguments.output or Path(expand(experiment.config.output_dir))
    if arguments.list:
        print("\n".join(commands(experiment, output, seeds, arms)))
        return 0
    own = seeds if arguments.seed is None else [arguments.seed]
    if launched_size() > 1:
        train_together(experiment, output, seeds=own, arms=arms)
        return 0
    failures = []
    if arguments.report and not output.is_dir():
        raise UserError(f"{output}: no such folder; nothing of this experiment has been run there")
    if not arguments.report:
        failures = run_experiment(experiment, output, seeds=own, arms=arms, report_seeds=seeds)
    print(write_experiment_report(experiment, output, seeds))
    for failure in failures:
        print(f"minillm: {failure}", file=sys.stderr)
    return STOPPED if failures else 0


def _plan(arguments: argparse.Namespace) -> int:
    from minillm.config.loader.run_plan import load_run
    from minillm.planning.advice import advise
    from minillm.planning.planner import plan_run
    from minillm.planning.table import assumptions, render, to_json

    files, overrides = split(arguments.words)
    plan = load_run(files, overrides)
    run = plan_run(plan, gpu=arguments.gpu, world_size=arguments.world_size)
    advice = advise(plan, run, overrides)
    if arguments.json:
        print(to_json(run, advice))
        return 0
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(render(run, advice), highlight=False)
    for line in assumptions():
        console.print(f"[dim]{line}[/dim]", highlight=False)
    return 0


def _eval(arguments: argparse.Namespace) -> int:
    from minillm.cli.eval import evaluate_model, evaluation_plan
    from minillm.reporting.console import Console

    files, overrides = split(arguments.words)
    plan = evaluation_plan(files, overrides, seeds=arguments.seeds, max_prompts=arguments.max_prompts)
    with Console() as console:
        evaluate_model(
            arguments.model, plan, console, dtype=arguments.dtype, output=arguments.output, figures=arguments.figures
        )
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from minillm.cli.generate import generate
    from minillm.reporting.console import Console

    options = {name: value for name, value in vars(arguments).items() if name != "verb"}
    with Console() as console:
        generate(console=console, **options)
    return 0


def _bench(name: str, argv: list[str]) -> int:
    from importlib import import_module

    return import_module(f"minillm.benchmarks.{name}").main(argv) or 0


def _report(arguments: argparse.Namespace) -> int:
    from minillm.reporting.report import compare_reports, write_report

    if len(arguments.runs) == 1:
        print(write_report(arguments.runs[0]))
    else:
        print(compare_reports(arguments.runs, figure=arguments.figure), end="")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    import json

    from minillm.config.loader.schema import file_schema

    print(json.dumps(file_schema(), indent=2))
    return 0


VERBS = {
    "train": _train,
    "validate": _validate,
    "plan": _plan,
    "experiment": _experiment,
    "eval": _eval,
    "generate": _generate,
    "report": _report,
    "schema": _schema,
}


if __name__ == "__main__":
    program()
