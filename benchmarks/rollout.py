"""`minillm bench rollout`: sampling from a student and from a mixture, beside transformers' `generate`.

Both sides answer the same prompts with the same random models, in turns, in one process; the ratio is the median over
the turns of what `generate` took over what we took. The mixture's peer is a LogitsProcessor that runs the teacher with
a key-value cache of its own. Our side records the log-probability of every token; `generate` does not.
"""

import argparse
import csv
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
)

from minillm.benchmarks.machine import as_table, describe
from minillm.models.pair import Models
from minillm.rollout.sampling import Sampling, sample

ALPHA = 0.2
MODES = ("student", "mixture")
LENGTHS = ("full", "ending")  # every answer as long as allowed, or ended by an EOS on the way
COLUMNS = ("hidden", "layers", "vocab", "mode", "answers", "ours_tokens_per_s", "generate_tokens_per_s", "ratio")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    hidden: int
    layers: int
    vocab: int
    mode: str
    answers: str


@dataclass(frozen=True)
class Timing:
    """Medians over the repeats."""

    case: Case
    ours: float  # response tokens a second
    peer: float
    ratio: float  # above 1: we are faster

    def cells(self) -> list[str]:
        case = self.case
        return [
            *map(str, (case.hidden, case.layers, case.vocab, case.mode, case.answers)),
            f"{self.ours:.0f}",
            f"{self.peer:.0f}",
            f"{self.ratio:.2f}",
        ]


def main(argv: list[str] | None = None) -> int:
    """Measures and prints a table; writes it with --output. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads)
    try:
        machine = describe("cpu", threads=arguments.threads)
        timings = [timing for shape in arguments.shapes for timing in _measure_shape(shape, arguments)]
    finally:
        torch.set_num_threads(before)
    page = _markdown(timings, machine, arguments)
    print(page)
    if arguments.output:
        folder = Path(arguments.output)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rollout.md").write_text(page, encoding="utf-8")
        with (folder / "rollout.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *(timing.cells() for timing in timings)])
        print(f"written to {folder}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm bench rollout", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        default=[(128, 4), (512, 8)],
        metavar="HIDDENxLAYERS",
        help="of student and teacher (default: 128x4 512x8)",
    )
    parser.add_argument("--vocab", type=int, default=32_000, help="default: %(default)s")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--answers", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--prompts", type=int, default=32, help="answered side by side (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of the longest prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own")
    parser.add_argument("--seed", type=int, default=0, help="of weights, prompts and order (default: %(default)s)")
    parser.add_argument("--output", help="folder for rollout.md and rollout.csv (default: print only)")
    return parser


def _shape(text: str) -> tuple[int, int]:
    try:
        hidden, layers = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not HIDDENxLAYERS, such as 128x4") from None
    return hidden, layers


def _measure_shape(shape: tuple[int, int], arguments: argparse.Namespace) -> list[Timing]:
    student, teacher = (make_model(*shape, arguments.vocab, arguments.seed + place) for place in range(2))
    prompts = make_prompts(arguments)
    timings = []
    for mode in arguments.modes:
        for answers in arguments.answers:
            # about one EOS in 24 tokens of a random model
            eos_ids = tuple(range(1, arguments.vocab, 24)) if answers == "ending" else ()
            models = Models(student, teacher, None, arguments.vocab, eos_ids, 0, torch.device("cpu"))
            case = Case(*shape, arguments.vocab, mode, answers)
            print(f"{case}", file=sys.stderr)
            timings.append(_compare(case, models, prompts, arguments))
    return timings


def make_model(hidden: int, layers: int, vocab: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    heads = max(4, hidden // 64)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def make_prompts(arguments: argparse.Namespace) -> list[list[int]]:
    """Prompts of half to the whole of the longest length."""
    order = random.Random(arguments.seed)
    longest = arguments.prompt_tokens
    lengths = [longest, *(order.randint(max(1, longest // 2), longest) for _ in range(arguments.prompts - 1))]
    return [[order.randrange(1, arguments.vocab) for _ in range(length)] for length in lengths]


def _compare(case: Case, models: Models, prompts: list[list[int]], arguments: argparse.Namespace) -> Timing:
    sides = {"ours": ours(case.mode, models, prompts, arguments), "peer": peer(case.mode, models, prompts, arguments)}
    for run in sides.values():
        run(0)
    order = random.Random(arguments.seed)
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    for repeat in range(1, arguments.repeats + 1):
        for side in order.sample(sorted(sides), 2):
            start = time.perf_counter()
            tokens = sides[side](repeat)
            rates[side].append(tokens / (time.perf_counter() - start))
    ratios = [mine / theirs for mine, theirs in zip(rates["ours"], rates["peer"], strict=True)]
    return Timing(case, *map(statistics.median, (rates["ours"], rates["peer"], ratios)))


def ours(mode: str, models: Models, prompts: list[list[int]], arguments: argparse.Namespace) -> Callable[[int], int]:
    """A call samples every prompt once and returns the number of response tokens."""
    sampling = Sampling(arguments.tokens, alpha=ALPHA if mode == "mixture" else 0.0)

    def run(repeat: int) -> int:
        answers = sample(
            models,
            prompts,
            sampling,
            keys=range(len(prompts)),
            seed=arguments.seed,
            draw=repeat,
            who=mode,
            batch_size=len(prompts),
        )
        return sum(len(answer.response) for answer in answers)

    return run


def peer(mode: str, models: Models, prompts: list[list[int]], arguments: argparse.Namespace) -> Callable[[int], int]:
    """The same through `generate` with its dynamic cache."""
    width = max(map(len, prompts))
    ids = torch.tensor([[models.pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=arguments.tokens,
        eos_token_id=list(models.eos_ids) or None,
        pad_token_id=models.pad_id,
    )
    ends = torch.tensor(models.eos_ids, dtype=torch.int64)

    def run(repeat: int) -> int:
        torch.manual_seed(arguments.seed + repeat)
        processors = [TeacherMixing(models.teacher, mask, ALPHA)] if mode == "mixture" else []
        written = models.student.generate(
            ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList(processors)
        )[:, width:]
        ended_before = torch.isin(written, ends).cumsum(-1) - torch.isin(written, ends).long()
        return int((ended_before == 0).sum())

    return run


class TeacherMixing(LogitsProcessor):
    """log(alpha p + (1 - alpha) q): runs the teacher inside `generate`, on the new tokens alone."""

    def __init__(self, teacher: LlamaForCausalLM, mask: Tensor, alpha: float):  # (B, L) of the left-padded prompts
        self.teacher, self.mask, self.alpha = teacher, mask, alpha
        self.cache = DynamicCache(config=teacher.config)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # (B, L), (B, V)
        seen = self.cache.get_seq_length()
        if seen:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)[:, seen:]
        logits = self.teacher(
            input_ids[:, seen:],
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        return (self.alpha * logits.float().softmax(-1) + (1 - self.alpha) * scores.softmax(-1)).log()


def _markdown(timings: list[Timing], machine: dict[str, str], arguments: argparse.Namespace) -> str:
    settings = {
        "answers": f"{arguments.prompts} prompts of up to {arguments.prompt_tokens} tokens, at most {arguments.tokens} new",
        "repeats": arguments.repeats,
        "alpha": ALPHA,
    }
    lines = [
        "# Rollouts",
        "",
        "| hidden | layers | vocabulary | sampled from | answers | ours, tokens/s | generate, tokens/s | ratio |",
        "|--:|--:|--:|---|---|--:|--:|--:|",
        *("| " + " | ".join(timing.cells()) + " |" for timing in timings),
        "",
        "Medians over the repeats; the ratio is taken in each repeat, in which both sides run one after the other. "
        "`ending`: answers end at an EOS, about one token in 24; tokens up to it are counted.",
        "",
        *as_table({**machine, **settings}),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
