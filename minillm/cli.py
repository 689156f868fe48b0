"""The command line: `minillm train run.yaml`. Each verb is a small function; what it needs is imported when it runs.

Exit status: 0 done, 1 a run that had to stop, 2 something to correct in what was given, 130 interrupted.
"""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import minillm
from minillm.launcher import end, launched_rank, launched_size

STOPPED, WRONG_INPUT, INTERRUPTED = 1, 2, 130
BENCHMARKS = ("kernels", "plan", "rollout", "step")
DTYPES = ("float32", "bfloat16", "float16")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")


def program(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end this process with its exit status."""
    end(main(argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["bench"] and argv[1:2] and argv[1] in BENCHMARKS:  # its options are its own
            return _bench(argv[1], argv[2:])
        arguments = _parse(argv)
        return arguments.run(arguments)
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last checkpoint" if argv[:1] == ["train"] else ""
        hint = "; the same command goes on" if argv[:1] == ["experiment"] else hint
        print(f"minillm: interrupted{hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STOPPED
    except Exception as error:
        status = _status(error)
        if status is None:
            raise
        print(f"minillm: {error}", file=sys.stderr)
        return status


def _parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; files and overrides may stand on both sides of an option."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (any(word.startswith("-") for word in rest) or "words" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.words += rest
    return arguments


def _status(error: Exception) -> int | None:
    """The exit status of an error whose message is for the user; None for a defect, which keeps its traceback.

    ConfigErrors and TrainingError are known by name, so that nothing heavy is imported to recognise them. A ValueError
    or a missing file is about the input where minillm raises it itself, and an OSError where a model or data set is
    not on the hub.
    """
    name = type(error).__name__
    if name in ("ConfigErrors", "TrainingError"):
        return WRONG_INPUT if name == "ConfigErrors" else STOPPED
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = Path(last.filename).is_relative_to(Path(__file__).parent) and (last.line or "").startswith("raise")
    of_the_hub = {"transformers", "huggingface_hub", "datasets"} & set(Path(last.filename).parts)
    if isinstance(error, ValueError | FileNotFoundError) and ours or isinstance(error, OSError) and of_the_hub:
        return WRONG_INPUT
    return None


def _train(arguments: argparse.Namespace) -> int:
    from minillm.config.loading import load_run

    plan = load_run(*_split(arguments.words))
    if launched_size() > 1 and any(stage.config.engine.type == "torch" for stage in plan.stages):
        raise ValueError(
            "engine.type torch is one process; start it without a launcher of several, or set engine.type=deepspeed"
        )
    folder = plan.output_dir
    first = launched_rank() == 0  # the others come to a folder that it may have begun to fill
    if first and not arguments.resume and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"output_dir {folder} is not empty: add --resume to go on from its newest checkpoint, or choose another "
            "folder with output_dir=..."
        )
    from minillm.console import Console
    from minillm.run import run

    with Console() as console:
        run(plan, resume=arguments.resume, console=console)
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from minillm.config.document import dump
    from minillm.config.loading import load_run, resolved

    print(dump(resolved(load_run(*_split(arguments.words)))), end="")
    return 0


def _experiment(arguments: argparse.Namespace) -> int:
    from minillm.config.paths import expand
    from minillm.experiment.jobs import commands
    from minillm.experiment.loading import chosen_arms, chosen_seeds, load_experiment
    from minillm.experiment.report import write_experiment_report
    from minillm.experiment.runner import run_experiment, train_together

    experiment = load_experiment(arguments.name, arguments.words)
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
        raise ValueError(f"{output}: no such folder; nothing of this experiment has been run there")
    if not arguments.report:
        failures = run_experiment(experiment, output, seeds=own, arms=arms, report_seeds=seeds)
    print(write_experiment_report(experiment, output, seeds))
    for failure in failures:
        print(f"minillm: {failure}", file=sys.stderr)
    return STOPPED if failures else 0


def _plan(arguments: argparse.Namespace) -> int:
    from minillm.config.loading import load_run
    from minillm.planning.advice import advise
    from minillm.planning.plan import plan_run
    from minillm.planning.table import assumptions, render, to_json

    files, overrides = _split(arguments.words)
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
    from minillm.console import Console
    from minillm.evaluate.standalone import evaluate_model, evaluation_plan

    files, overrides = _split(arguments.words)
    plan = evaluation_plan(files, overrides, seeds=arguments.seeds, max_prompts=arguments.max_prompts)
    with Console() as console:
        evaluate_model(
            arguments.model, plan, console, dtype=arguments.dtype, output=arguments.output, figures=arguments.figures
        )
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    from minillm.console import Console
    from minillm.generate import generate

    options = {name: value for name, value in vars(arguments).items() if name not in ("run", "verb")}
    with Console() as console:
        generate(console=console, **options)
    return 0


def _bench(name: str, argv: list[str]) -> int:
    from importlib import import_module

    return import_module(f"minillm.benchmarks.{name}").main(argv) or 0


def _report(arguments: argparse.Namespace) -> int:
    from minillm.report import compare_reports, write_report

    if len(arguments.runs) == 1:
        print(write_report(arguments.runs[0]))
    else:
        print(compare_reports(arguments.runs, figure=arguments.figure), end="")
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    import json

    from minillm.config.schema import file_schema

    print(json.dumps(file_schema(), indent=2))
    return 0


def _split(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files, and overrides: what is of the form group.key=value and is not the name of a file."""
    overrides = [word for word in words if _OVERRIDE.match(word) and not os.path.exists(word)]
    return [Path(word) for word in words if word not in overrides], overrides


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minillm", description="Distil a large causal language model into a small one."
    )
    parser.add_argument("--version", action="version", version=f"minillm {minillm.__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)

    train = verbs.add_parser("train", help="train every stage of a configuration")
    _add_files(train)
    train.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint, if there is one")
    train.set_defaults(run=_train)

    validate = verbs.add_parser("validate", help="all errors of a configuration at once, or what it resolves to")
    _add_files(validate)
    validate.set_defaults(run=_validate)

    plan = verbs.add_parser("plan", help="memory a rank, time a step and ranks needed, without loading a weight")
    _add_files(plan)
    plan.add_argument("--gpu", default="H100-80GB", help="H100-80GB, H200, A100-80GB, A100-40GB, L40S, 4090, cpu ...")
    plan.add_argument("--world-size", type=_positive, default=1, help="ranks, a GPU each (default %(default)s)")
    plan.add_argument("--json", action="store_true", help="for programs: bytes, FLOPs and seconds")
    plan.set_defaults(run=_plan)

    experiment = verbs.add_parser(
        "experiment", help="train and measure every arm of an experiment; goes on where it was"
    )
    experiment.add_argument("name", metavar="NAME_OR_FILE", help="of configs/experiments, or a .yaml file")
    experiment.add_argument("words", nargs="*", metavar="KEY=VALUE", help="base.train.learning_rate=..., arms.kd....")
    experiment.add_argument("--seeds", type=_positive, metavar="N", help="the first N, instead of those of the file")
    experiment.add_argument("--seed", type=_natural, metavar="S", help="work on this seed alone")
    experiment.add_argument("--arms", metavar="A,B", help="work on these arms alone, and on what they start from")
    experiment.add_argument("--output", type=Path, metavar="DIR", help="instead of output_dir of the file")
    experiment.add_argument("--list", action="store_true", help="print a command a run instead, for a cluster")
    experiment.add_argument(
        "--report", action="store_true", help="write the report of what is there, and train nothing"
    )
    experiment.set_defaults(run=_experiment)

    evaluate = verbs.add_parser("eval", help="measure a model on held-out prompts")
    evaluate.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run's folder, a model's, a hub name, or `teacher`: FILE's teacher"
    )
    evaluate.add_argument(
        "words", nargs="+", metavar="FILE|KEY=VALUE", help="a configuration with `eval` and perhaps `teacher`, or data"
    )
    evaluate.add_argument("--seeds", type=int, nargs="+", help="instead of eval.seeds")
    evaluate.add_argument("--max-prompts", type=_positive, help="of every set the first so many")
    evaluate.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default %(default)s)")
    evaluate.add_argument("--output", type=Path, metavar="JSON", help="write the result, with samples")
    evaluate.add_argument(
        "--figures", type=Path, metavar="DIR", help="draw the analyses: exposure bias, calibration ..."
    )
    evaluate.set_defaults(run=_eval)

    generate = verbs.add_parser("generate", help="answers on the terminal, the student's beside the teacher's")
    generate.add_argument("model", metavar="MODEL", help="a run's folder, a model's, or a hub name")
    generate.add_argument("--teacher", metavar="MODEL", help="whose answers are shown beside")
    generate.add_argument(
        "--prompt", action="append", dest="prompts", default=[], help="may be repeated; without it, lines of stdin"
    )
    generate.add_argument("--max-new-tokens", type=_positive, default=256)
    generate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default %(default)s)")
    generate.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    generate.add_argument("--top-p", type=float, default=1.0)
    generate.add_argument("--no-repeat-ngram-size", type=int, default=0)
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument(
        "--template", choices=("auto", "chat", "alpaca", "none"), default="auto", help="auto: as the run was trained"
    )
    generate.add_argument("--system", help="the system message of a chat")
    generate.add_argument("--tokenizer", help="of another folder or hub name")
    generate.add_argument("--dtype", choices=DTYPES, default="float32")
    generate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    generate.set_defaults(run=_generate)

    bench = verbs.add_parser("bench", help="micro-benchmarks; --help after the name shows the options")
    bench.add_argument("name", choices=BENCHMARKS)

    report = verbs.add_parser("report", help="write a run's report, or compare several runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    report.add_argument("--figure", type=Path, metavar="PNG", help="of several runs: draw their curves here")
    report.set_defaults(run=_report)

    verbs.add_parser("schema", help="JSON schema of the configuration, for editors").set_defaults(run=_schema)
    return parser


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="FILE|KEY=VALUE", help="YAML files, merged left to right, and group.key=value"
    )


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {number}")
    return number


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


if __name__ == "__main__":
    program()
