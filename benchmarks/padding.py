"""`minillm bench padding`: what it saves to cut a step into micro-batches of like lengths, and to pack them, on given records.

Steps of word-level distillation of random Llama models, each taken four times on the same references, cut by length and as
they come, with padding and packed, in a random order and without moving a weight. Seconds are those of this process on the
CPU, not the clock's, so that a machine that others use gives the same ratio; on a GPU they are the clock's.
"""

import argparse
import random
import statistics
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer

from minillm.benchmarks.machine import describe, show_page
from minillm.benchmarks.mixture import now
from minillm.benchmarks.rollout_providers import make_model
from minillm.config.data import JsonlPrompts
from minillm.config.training import TorchEngine as TorchEngineConfig
from minillm.config.training import TrainConfig
from minillm.data.instructions import load_prompts
from minillm.data.stream import Stream
from minillm.engine.torch import TorchEngine
from minillm.methods.protocol import Term
from minillm.methods.supervised import mixed_term
from minillm.models.batch import TokenSequence
from minillm.models.device import pick_device
from minillm.models.packing import pack_batches, reads_packed
from minillm.teachers.local import LocalTeacher
from minillm.teachers.pair import Models
from minillm.train.micro_batches import cut_step

WAYS = {
    (by_length, packed): name + ", packed" * packed
    for packed in (False, True)
    for by_length, name in ((False, "as they come"), (True, "by length"))
}


def main(argv: list[str] | None = None) -> int:
    """Measures and prints a table; writes it with --output. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    device = pick_device(arguments.device)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        machine = describe(device.type, threads=arguments.threads)
        lines = _measure(arguments, device)
    finally:
        torch.set_num_threads(before)
    settings = {
        "student, teacher": f"{arguments.student}, {arguments.teacher} (hidden x layers), with the tokenizer's vocabulary",
        "records": f"{Path(arguments.data).name}, template {arguments.template}, prompts of at most "
        f"{arguments.prompt_tokens} tokens and answers of at most {arguments.tokens}",
        "dtype, attention": f"{arguments.dtype}, {arguments.attention}",
        "step": f"{arguments.micro_batches} micro-batches of {arguments.batch_size}",
        "steps": f"{arguments.steps}, and one that is not counted",
    }
    head = ["| micro-batches | padding, % | s | tokens/s | over as they come |", "|---|--:|--:|--:|--:|"]
    show_page([*head, *lines], arguments.output, {**machine, **settings})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm bench padding", description=__doc__.partition("\n\n")[0])
    parser.add_argument("data", metavar="JSONL", help="records of instruction and output")
    parser.add_argument("--tokenizer", required=True, metavar="FOLDER", help="of a model: its lengths are measured")
    parser.add_argument("--template", default="alpaca", help="of the prompts (default: %(default)s)")
    parser.add_argument("--student", default="256x4", metavar="HIDDENxLAYERS", help="default: %(default)s")
    parser.add_argument("--teacher", default="512x8", metavar="HIDDENxLAYERS", help="default: %(default)s")
    parser.add_argument("--attention", default="sdpa", help="an attn_implementation (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of both models (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="of a micro-batch (default: %(default)s)")
    parser.add_argument("--micro-batches", type=int, default=8, help="of a step (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of the longest prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer at most (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and order (default: %(default)s)")
    parser.add_argument("--output", metavar="MD", help="write the table")
    return parser


def _measure(arguments: argparse.Namespace, device: torch.device) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    shapes = [tuple(map(int, one.split("x"))) for one in (arguments.student, arguments.teacher)]
    dtype = getattr(torch, arguments.dtype)
    pair = [make_model(*shape, len(tokenizer), seed).to(device, dtype) for seed, shape in enumerate(shapes)]
    for model in pair:
        model.set_attn_implementation(arguments.attention)
    student, teacher = pair
    eos = tokenizer.eos_token_id
    teacher = LocalTeacher(teacher.requires_grad_(False))
    models = Models(student, teacher, tokenizer, len(tokenizer), (eos,), eos, device)
    keys = JsonlPrompts(
        path=arguments.data,
        template=arguments.template,
        max_prompt_length=arguments.prompt_tokens,
        max_response_length=arguments.tokens,
    )
    references = Stream([one for one in load_prompts(keys, tokenizer) if one.response_ids], seed=arguments.seed)
    engine = TorchEngine(models, TrainConfig(max_steps=1, learning_rate=1e-30), TorchEngineConfig(), total_steps=1)
    order, size = random.Random(arguments.seed), arguments.batch_size
    seconds: dict[tuple[bool, bool], list[float]] = {way: [] for way in WAYS}
    fed: dict[tuple[bool, bool], int] = dict.fromkeys(WAYS, 0)
    real, predicted = 0, []
    for _ in range(arguments.steps + 1):
        items = [one.sequence for one in references.take(size * arguments.micro_batches)]
        real += sum(item.width - 1 for item in items)  # the last token is predicted, never fed
        predicted.append(sum(len(item.response) for item in items))
        for way in order.sample(sorted(WAYS), len(WAYS)):
            by_length, packed = way
            for model in pair:
                pack_batches(model, packed)
            start = now(device)
            terms = [_term(part, models) for part in cut_step(items, size, by_length=by_length)]
            engine.step([[term] for term in terms])
            seconds[way].append(now(device) - start)
            batches = [term.batch for term in terms]
            fed[way] += sum(sum(one.widths) if reads_packed(student, one) else one.input_ids.numel() for one in batches)
    lines, plain = [], seconds[(False, False)][1:]
    for way, name in WAYS.items():
        taken = seconds[way][1:]
        ratio = statistics.median(a / b for a, b in zip(plain, taken, strict=True))
        padding, rate = 100 * (1 - real / fed[way]), sum(predicted[1:]) / sum(taken)
        lines.append(f"| {name} | {padding:.0f} | {statistics.median(taken):.2f} | {rate:.0f} | {ratio:.2f} |")
    return lines


def _term(items: list[TokenSequence], models: Models) -> Term:
    return mixed_term(items, models, divergence="reverse_kl", ce_ratio=0.0)


if __name__ == "__main__":
    sys.exit(main())
