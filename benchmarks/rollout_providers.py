"""The samplers that `minillm bench rollout` compares: our two decode loops and transformers' `generate` with two kinds of cache."""

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass

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

from minillm.rollout.local.local_rollouts import LocalRollouts
from minillm.rollout.local.token_drawing import pad_left
from minillm.rollout.rollouts import Sampling
from minillm.teachers.pair import Models

ALPHA = 0.2
BASELINE = "generate"
PROVIDERS = {
    "ours": "minillm",
    "ours-coins": "minillm, shared coins",
    "ours-batches": "minillm, one batch after the other",
    "ours-unshared": "minillm, a prompt read for every answer",
    "ours-graphs": "minillm, CUDA graphs",
    "generate": "generate, dynamic cache",
    "generate-static": "generate, static cache",
}


@dataclass(frozen=True)
class Drawn:
    """The work of a provider: answers to all prompts."""

    lengths: list[int]  # tokens of the answers, those to the longest prompts first
    prompt_tokens: int  # that were read

    @property
    def tokens(self) -> int:
        """Tokens of all answers."""
        return sum(self.lengths)


Run = Callable[[int], Drawn]  # answers every prompt; from the number of the repeat


def why_not(provider: str, device: torch.device, answers_per_prompt: int) -> str | None:
    """The reason for which a provider cannot run, None where it can."""
    if provider == "ours-coins" and answers_per_prompt > 1:
        return "reads a prompt for every answer"
    if provider == "ours-unshared" and answers_per_prompt == 1:
        return "is the same with one answer to each prompt"
    if provider == "ours-graphs" and answers_per_prompt > 1:
        return "reads a prompt for every answer"
    return "needs a GPU" if provider == "ours-graphs" and device.type != "cuda" else None


def prepare(provider: str, mode: str, models: Models, prompts: list[list[int]], arguments: argparse.Namespace) -> Run:
    """The provider, ready to run on models of its device."""
    if provider.startswith("ours"):
        rollouts = LocalRollouts(
            models,
            cuda_graphs=provider == "ours-graphs",
            shared_coins=provider == "ours-coins",
            share_prompts=arguments.answers_per_prompt > 1 and provider != "ours-unshared",
            refill=provider != "ours-batches",
        )
        return _ours(mode, rollouts, prompts, arguments)
    cache = "static" if provider == "generate-static" else None
    return _generate(mode, models, prompts, arguments, cache)


def _ours(mode: str, rollouts: LocalRollouts, prompts: list[list[int]], arguments: argparse.Namespace) -> Run:
    sampling = Sampling(arguments.tokens, alpha=ALPHA if mode == "mixture" else 0.0)
    read = {tuple(prompt) for prompt in prompts} if rollouts.share_prompts else prompts
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]), reverse=True)

    def run(repeat: int) -> Drawn:
        answers = rollouts.sample(
            prompts,
            sampling,
            keys=range(len(prompts)),
            seed=arguments.seed,
            draw=repeat,
            who=mode,
            batch_size=arguments.batch_size,
        )
        return Drawn([len(answers[place].response) for place in order], sum(map(len, read)))

    return run


def _generate(
    mode: str, models: Models, prompts: list[list[int]], arguments: argparse.Namespace, cache: str | None
) -> Run:
    settings = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=arguments.tokens,
        eos_token_id=list(models.eos_ids) or None,
        pad_token_id=models.pad_id,
        cache_implementation=cache,
    )
    ends = torch.tensor(models.eos_ids, dtype=torch.int64, device=models.device)
    prompts, size = sorted(prompts, key=len, reverse=True), arguments.batch_size

    def answer(batch: list[list[int]]) -> list[int]:  # the tokens of each answer
        ids, padding, _ = (part.to(models.device) for part in pad_left(batch, len(batch[0]), models.pad_id))
        mask = (torch.arange(ids.shape[1], device=models.device) >= padding).long()
        processors = [TeacherMixing(models.teacher.model, mask, ALPHA)] if mode == "mixture" else []
        written = models.student.generate(
            ids, attention_mask=mask, generation_config=settings, logits_processor=LogitsProcessorList(processors)
        )[:, ids.shape[1] :]
        ended_before = torch.isin(written, ends).cumsum(-1) - torch.isin(written, ends).long()
        return (ended_before == 0).sum(-1).tolist()

    def run(repeat: int) -> Drawn:
        torch.manual_seed(arguments.seed + repeat)
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        return Drawn([length for batch in batches for length in answer(batch)], sum(map(len, prompts)))

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


def make_model(hidden: int, layers: int, vocab: int, seed: int) -> LlamaForCausalLM:
    """A random Llama in fp32 on the CPU."""
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
    """Prompts of half to the whole of the longest length, each as often as there are answers to it."""
    order = random.Random(arguments.seed)
    longest = arguments.prompt_tokens
    lengths = [longest, *(order.randint(max(1, longest // 2), longest) for _ in range(arguments.prompts - 1))]
    prompts = [[order.randrange(1, arguments.vocab) for _ in range(length)] for length in lengths]
    return prompts * getattr(arguments, "answers_per_prompt", 1)
