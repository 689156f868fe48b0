"""The words of the command line: every verb's options, files and overrides."""

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path

import minillm

BENCHMARKS = (
    "choice",
    "control",
    "kernels",
    "mixture",
    "padding",
    "plan",
    "rollout",
    "save",
    "serve",
    "step",
    "tune",
)
DTYPES = ("float32", "bfloat16", "float16")
LARGEST_SEED = 2**63 - 1  # as for the key `seed`; the configuration is not imported for a help text
_OVERRIDE = re.compile(r"[A-Za-z_][\w.-]*=")


def parse(argv: list[str]) -> argparse.Namespace:
    """The parsed command line. Files and overrides may stand on both sides of an option."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (any(word.startswith("-") for word in rest) or "words" not in arguments):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.words += rest
    return arguments


def split(words: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Files, and overrides: words of the form group.key=value that are not the name of a file."""
    overrides = [word for word in words if _OVERRIDE.match(word) and not os.path.exists(word)]
    return [Path(word) for word in words if word not in overrides], overrides


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs, each of which has a help for every option."""
    parser = argparse.ArgumentParser(
        prog="minillm", description="Distil a large causal language model into a small one."
    )
    parser.add_argument("--version", action="version", version=f"minillm {minillm.__version__}")
    verbs = parser.add_subparsers(title="verbs", dest="verb", metavar="VERB", required=True)

    train = verbs.add_parser("train", help="train every stage of a configuration")
    _add_files(train)
    train.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint, if there is one")

    validate = verbs.add_parser("validate", help="all errors of a configuration at once, or what it resolves to")
    _add_files(validate)

    plan = verbs.add_parser(
        "plan", help="memory per rank, time per step and the ranks needed, without loading a weight"
    )
    _add_files(plan)
    plan.add_argument("--gpu", default="H100-80GB", help="H100-80GB, H200, A100-80GB, A100-40GB, L40S, 4090, cpu ...")
    plan.add_argument(
        "--world-size", type=_positive, default=1, help="number of ranks, each with one GPU (default %(default)s)"
    )
    plan.add_argument("--json", action="store_true", help="for programs: bytes, FLOPs and seconds")

    cache = verbs.add_parser(
        "cache", help="have the teacher read the data once, and write what it says to disk for training without it"
    )
    _add_files(cache)

    experiment = verbs.add_parser(
        "experiment", help="train and measure every arm of an experiment; goes on where it was"
    )
    experiment.add_argument(
        "words",
        nargs="*",
        metavar="NAME_OR_FILE|KEY=VALUE",
        help="a name of configs/experiments or a .yaml file (without it, the names are listed), and overrides such as "
        "base.train.learning_rate=... or arms.kd....",
    )
    experiment.add_argument(
        "--seeds", type=_positive, metavar="N", help="the first N seeds, instead of those of the file"
    )
    experiment.add_argument("--seed", type=_seed, metavar="S", help="work on this seed alone")
    experiment.add_argument("--arms", metavar="A,B", help="work on these arms alone, and on what they start from")
    experiment.add_argument("--output", type=Path, metavar="DIR", help="instead of output_dir of the file")
    experiment.add_argument("--list", action="store_true", help="print one command per run instead, for a cluster")
    experiment.add_argument(
        "--report", action="store_true", help="write the report of what is there, and train nothing"
    )

    evaluate = verbs.add_parser("eval", help="measure a model on held-out prompts")
    evaluate.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run's folder, a model's, a hub name, or `teacher`: FILE's teacher"
    )
    evaluate.add_argument(
        "words",
        nargs="+",
        metavar="FILE|KEY=VALUE",
        help="a configuration with `eval` and perhaps `teacher`, or data files",
    )
    _add_delta(evaluate)
    evaluate.add_argument("--seeds", type=_seed, nargs="+", help="instead of eval.seeds")
    evaluate.add_argument("--max-prompts", type=_positive, help="the most prompts that are taken from a set")
    evaluate.add_argument("--dtype", choices=DTYPES, help="of the model's weights (default float32)")
    evaluate.add_argument("--output", type=Path, metavar="JSON", help="write the result, with samples, to this file")
    evaluate.add_argument(
        "--figures",
        type=Path,
        metavar="DIR",
        help="draw the analyses (exposure bias, calibration, ...) into this folder",
    )

    generate = verbs.add_parser("generate", help="answers on the terminal, the student's beside the teacher's")
    generate.add_argument("model", metavar="MODEL", help="a run's folder, a model's, or a hub name")
    generate.add_argument("--teacher", metavar="MODEL", help="whose answers are shown beside")
    _add_delta(generate)
    generate.add_argument(
        "--prompt", action="append", dest="prompts", default=[], help="may be repeated; without it, lines of stdin"
    )
    generate.add_argument(
        "--image", action="append", dest="images", default=[], help="a picture that every prompt shows; may be repeated"
    )
    generate.add_argument("--max-new-tokens", type=_positive, default=256, help="of an answer (default %(default)s)")
    generate.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default %(default)s)")
    generate.add_argument("--top-k", type=int, default=0, help="sample from the likeliest K tokens; 0: from all")
    generate.add_argument(
        "--top-p", type=float, default=1.0, help="sample from the likeliest tokens with this probability; 1: from all"
    )
    generate.add_argument("--no-repeat-ngram-size", type=int, default=0, help="never repeat N tokens; 0: free to")
    generate.add_argument("--seed", type=_seed, default=0, help="of the sampling (default %(default)s)")
    generate.add_argument(
        "--template", choices=("auto", "chat", "alpaca", "none"), default="auto", help="auto: as the run was trained"
    )
    generate.add_argument("--system", help="the system message of a chat")
    generate.add_argument("--tokenizer", help="of another folder or hub name")
    generate.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default %(default)s)")
    generate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    generate.add_argument("--teacher-device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: the student's)")

    _add_serve(verbs)

    bench = verbs.add_parser("bench", help="micro-benchmarks; --help after the name shows the options")
    bench.add_argument("name", choices=BENCHMARKS, help="what is measured")

    report = verbs.add_parser("report", help="write a run's report, or compare several runs")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's output_dir")
    report.add_argument("--figure", type=Path, metavar="PNG", help="of several runs: draw their curves here")

    verbs.add_parser("schema", help="JSON schema of the configuration, for editors")
    return parser


def _add_serve(verbs) -> None:
    serve = verbs.add_parser("serve", help="run a teacher for students that are trained in other processes, over HTTP")
    serve.add_argument("model", metavar="MODEL", help="a run's folder, a model's, a .gguf file, or a hub name")
    serve.add_argument("--host", default="127.0.0.1", help="the address to listen on (default %(default)s)")
    serve.add_argument("--port", type=_port, default=8311, help="0: any that is free (default %(default)s)")
    serve.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default %(default)s)")
    serve.add_argument("--quantization", choices=("int8", "nf4"), help="keep the layers in 8 or 4 bits")
    serve.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    serve.add_argument("--tokenizer", help="of another folder or hub name, or byte")
    serve.add_argument(
        "--batch-tokens",
        type=_positive,
        metavar="N",
        help="let requests share a forward pass of up to N padded positions; the last bit of a row then depends on who else "
        "asks (default: a pass for each request)",
    )
    serve.add_argument(
        "--max-request-tokens",
        type=_positive,
        default=131_072,
        help="padded positions that one request may take (default %(default)s)",
    )
    serve.add_argument(
        "--max-request-mib", type=_positive, default=64, help="size of a request's body (default %(default)s)"
    )
    serve.add_argument("--queue", type=_positive, default=64, help="requests that may wait (default %(default)s)")
    serve.add_argument(
        "--token-env",
        default="MINILLM_TOKEN",
        metavar="NAME",
        help="the environment variable that holds the bearer token (default %(default)s)",
    )
    serve.add_argument("--tls-cert", type=Path, metavar="PEM", help="certificate chain: speak HTTPS")
    serve.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    serve.add_argument(
        "--grace", type=_positive, default=60, help="seconds that requests in hand get on SIGTERM (default %(default)s)"
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words", nargs="+", metavar="FILE|KEY=VALUE", help="YAML files, merged left to right, and group.key=value"
    )


def _add_delta(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--delta",
        metavar="RUN_OR_MODEL",
        help="a delta that method cmc trained: its logits are added to the model's, whose tokenizer may be another one",
    )
    parser.add_argument("--alpha", type=float, help="what the delta's logits are multiplied by (default 1)")


def _seed(text: str) -> int:
    return _whole_number(text, 0, LARGEST_SEED)


def _positive(text: str) -> int:
    return _whole_number(text, 1, None)


def _port(text: str) -> int:
    return _whole_number(text, 0, 65_535)


def _whole_number(text: str, lowest: int, highest: int | None) -> int:
    try:
        number = int(text)
    except ValueError:  # no number, or one of thousands of digits
        raise argparse.ArgumentTypeError(f"expected a whole number, not {text[:40]!r}") from None
    if number < lowest:
        raise argparse.ArgumentTypeError(f"must be at least {lowest}, not {text[:40]}")
    if highest is not None and number > highest:
        raise argparse.ArgumentTypeError(f"must be at most {highest}, not {text[:40]}")
    return number
