"""`minillm bench mixture`: what a buffer of a mixture's answers costs, sampled and scored, with and without shared coins.

All ways answer the same prompts with the same random models in turns, in one process. Seconds are those of this process
on the CPU, not the clock's, so that a machine that others use gives the same ratio; on a GPU they are the clock's.
"""

import argparse
import random
import statistics
import sys
import time

import torch

from minillm.benchmarks.machine import describe, show_page
from minillm.benchmarks.rollout import DTYPES
from minillm.benchmarks.rollout_providers import ALPHA, make_model, make_prompts
from minillm.models.device import pick_device
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.rollout.scoring import score
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models

BOTH = "both models for every token"
WAYS = {  # options of LocalRollouts
    BOTH: {},
    "shared coins": {"shared_coins": True},
    "both models, CUDA graphs": {"cuda_graphs": True},  # on a GPU
}


def main(argv: list[str] | None = None) -> int:
    """Measures and prints a table; writes it with --output. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    device = pick_device(arguments.device)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        machine = describe(device.type, threads=arguments.threads)
        lines = [line for ending in (False, True) for line in _measure(arguments, device, ending=ending)]
    finally:
        torch.set_num_threads(before)
    settings = {
        "student, teacher": f"{arguments.student}, {arguments.teacher} (hidden x layers), vocabulary {arguments.vocab}",
        "answers": f"{arguments.prompts} prompts of up to {arguments.prompt_tokens} tokens, "
        f"{arguments.batch_size or arguments.prompts} side by side, at most {arguments.tokens} new",
        "weights": arguments.dtype,
        "repeats": arguments.repeats,
        "alpha": ALPHA,
    }
    head = [
        "| answers | drawn by | sampling, s | scoring, s | tokens/s | over both models |",
        "|---|---|--:|--:|--:|--:|",
    ]
    show_page([*head, *lines], arguments.output, {**machine, **settings})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm bench mixture", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--student", default="512x8", metavar="HIDDENxLAYERS", help="default: %(default)s")
    parser.add_argument("--teacher", default="1024x12", metavar="HIDDENxLAYERS", help="default: %(default)s")
    parser.add_argument("--vocab", type=int, default=32_000, help="default: %(default)s")
    parser.add_argument("--prompts", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, help="answered side by side (default: all)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of the longest prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and order (default: %(default)s)")
    parser.add_argument("--output", metavar="MD", help="write the table")
    return parser


def _measure(arguments: argparse.Namespace, device: torch.device, *, ending: bool) -> list[str]:
    shapes = [tuple(map(int, one.split("x"))) for one in (arguments.student, arguments.teacher)]
    dtype = getattr(torch, arguments.dtype)
    student, teacher = (
        make_model(*shape, arguments.vocab, seed).to(device, dtype) for seed, shape in enumerate(shapes)
    )
    eos_ids = tuple(range(1, arguments.vocab, 24)) if ending else ()  # about one EOS in 24 tokens of a random model
    models = Models(student, LocalTeacher(teacher), None, arguments.vocab, eos_ids, 0, device)
    prompts, order = make_prompts(arguments), random.Random(arguments.seed)
    ways = [way for way, options in WAYS.items() if device.type == "cuda" or "cuda_graphs" not in options]
    rollouts = {way: LocalRollouts(models, **WAYS[way]) for way in ways}
    for one in rollouts.values():
        one.check("student", "teacher")
    seconds: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
    for repeat in range(arguments.repeats):
        for way in order.sample(ways, len(ways)):
            seconds[way].append(_fill_buffer(rollouts[way], prompts, arguments, repeat))
    lines = []
    for name in ways:
        sampling, scoring, rate = map(statistics.median, zip(*seconds[name], strict=True))
        ratio = statistics.median(a[2] / b[2] for a, b in zip(seconds[name], seconds[BOTH], strict=True))
        answers = "ending" if ending else "full"
        lines.append(f"| {answers} | {name} | {sampling:.2f} | {scoring:.2f} | {rate:.0f} | {ratio:.2f} |")
    return lines


def _fill_buffer(
    rollouts: LocalRollouts, prompts: list[list[int]], arguments: argparse.Namespace, draw: int
) -> tuple[float, float, float]:
    """Seconds of sampling and of scoring, and response tokens a second of both together."""
    keys, size = range(len(prompts)), arguments.batch_size or len(prompts)
    sampling = Sampling(arguments.tokens, alpha=ALPHA)
    start = now(rollouts.models.device)
    answers = rollouts.sample(
        prompts, sampling, keys=keys, seed=arguments.seed, draw=draw, who="mixture", batch_size=size
    )
    sampled = now(rollouts.models.device)
    score(rollouts.models, answers, keys=keys, batch_size=size)
    scored = now(rollouts.models.device)
    tokens = sum(len(answer.response) for answer in answers)
    return sampled - start, scored - sampled, tokens / (scored - start)


def now(device: torch.device) -> float:
    """Seconds of this process; on a GPU, which works on its own, of the clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    sys.exit(main())
