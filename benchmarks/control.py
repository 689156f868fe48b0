"""`minillm bench control`: how far a delta that was trained to write in upper case carries that to models.

Of every model and seed: the share of upper-case letters in answers to held-out prompts, and the loss on the references,
alone, with the delta, and, where the two tokenizers differ, with a random permutation of the map between them.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from minillm.benchmarks.machine import describe, show_page
from minillm.config.data import JsonlPrompts
from minillm.data.instructions import PromptSet, load_prompts
from minillm.evaluate.token_statistics import token_statistics
from minillm.models.open import model_path
from minillm.models.vocabulary_map import VocabularyMap
from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.rollouts import Sampling
from minillm.teachers.open import open_named, with_delta
from minillm.teachers.pair import Models


def main(argv: list[str] | None = None) -> int:
    """Measures and prints a table; writes it with --output. Returns the exit status."""
    arguments = _parser().parse_args(argv)
    lines = [
        "| model | seed | logits | upper-case letters, % | loss on the references, nats/token |",
        "|---|--:|---|--:|--:|",
    ]
    for name in arguments.models:
        for seed in arguments.seeds:
            models, _ = open_named(model_path(name.format(seed=seed)), None, device="cpu")
            for kind, one in _variants(models, arguments.delta.format(seed=seed), seed):
                upper, loss = _measure(one, _prompts(arguments, models), arguments.tokens, seed)
                lines.append(f"| {name} | {seed} | {kind} | {upper:.1f} | {loss:.2f} |")
    about = {"delta": arguments.delta, "prompts": arguments.limit, "answers": f"at most {arguments.tokens} tokens"}
    show_page(lines, arguments.output, {**describe("cpu"), **about})
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minillm bench control", description=__doc__.partition("\n\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL", help="runs or models; {seed} stands for the seed")
    parser.add_argument("--delta", required=True, metavar="RUN_OR_MODEL", help="likewise")
    parser.add_argument("--prompts", required=True, metavar="JSONL", help="records of prompt and completion")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="of the answers (default: 1)")
    parser.add_argument("--limit", type=int, default=32, help="prompts that are answered (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="of an answer at most (default: %(default)s)")
    parser.add_argument("--output", metavar="MD", help="write the table")
    return parser


def _prompts(arguments: argparse.Namespace, models: Models) -> PromptSet:
    keys = JsonlPrompts(
        path=arguments.prompts, template="none", max_prompt_length=128, max_response_length=96, limit=arguments.limit
    )
    return load_prompts(keys, models.tokenizer)


def _variants(models: Models, delta: str, seed: int) -> Iterator[tuple[str, Models]]:
    """(words, models) of the model alone, with the delta, and with a delta whose map is shuffled."""
    yield "its own", models
    controlled = with_delta(models, model_path(delta))
    yield "with the delta's", controlled
    translation = controlled.delta.translation
    if translation is not None:
        made = translation.map
        order = torch.randperm(len(made.ids), generator=torch.Generator().manual_seed(seed))
        shuffled = replace(translation, map=VocabularyMap(made.ids[order], made.kinds[order]))
        yield "with the delta's, map shuffled", replace(models, delta=replace(controlled.delta, translation=shuffled))


def _measure(models: Models, prompts: PromptSet, tokens: int, seed: int) -> tuple[float, float]:
    """Upper-case letters of the answers in percent, and nats a token of the references."""
    examples, size = prompts.examples, len(prompts)
    asked = [example.prompt_ids for example in examples]
    answers = LocalRollouts(models).sample(asked, Sampling(tokens), keys=range(size), seed=seed, batch_size=size)
    texts = [models.tokenizer.decode(answer.response, skip_special_tokens=True) for answer in answers]
    found = token_statistics(models, [one.sequence for one in examples], ("student_logprob",), batch_size=size)
    loss = -torch.cat(found["student_logprob"]).mean().item()
    return upper_case_percent(texts), loss


def upper_case_percent(texts: Sequence[str]) -> float:
    """The part of all letters that are upper case, NaN where there is no letter."""
    letters = [letter.isupper() for text in texts for letter in text if letter.isalpha()]
    return 100 * sum(letters) / len(letters) if letters else float("nan")


if __name__ == "__main__":
    sys.exit(main())
