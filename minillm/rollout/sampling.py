"""Sampling answers from the student, the teacher or their mixture, in one decode loop.

The mixture is of probabilities, token by token: p~ = alpha p + (1 - alpha) q (MiniLLM, arXiv 2306.08543, section 2.2),
each model's distribution processed by temperature, top-k and top-p first. Both KV caches stay alive.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minillm.models.pair import Models
from minillm.rollout.decoder import Decoder
from minillm.rollout.noise import uniforms

Who = Literal["student", "teacher", "mixture"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int
    temperature: float = 1.0  # 0: the most likely token
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    alpha: float = 0.0  # the teacher's share in the mixture
    no_repeat_ngram_size: int = 0  # 0: repetition is allowed


@dataclass
class Answer:
    """One sampled response."""

    prompt: list[int]
    response: list[int]  # with its EOS where it ended
    ended: bool
    logprobs: Tensor  # (T,) fp32 on the CPU: log-probability under the distribution sampled from (0 where greedy)


@torch.no_grad()
def sample(
    models: Models,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    *,
    keys: Sequence[int],
    seed: int,
    draw: int = 0,
    who: Who = "student",
    batch_size: int,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """One answer a prompt, in the order given.

    The noise of an answer is keyed by (seed, its key, draw, position): it does not depend on the batch, so the answers
    do not either, up to ties within rounding. `progress` is called with the number of answers done.
    Raises ValueError for an empty prompt.
    """
    empty = [key for prompt, key in zip(prompts, keys, strict=True) if not prompt]
    if empty:
        raise ValueError(f"sample: the prompts with keys {empty[:5]} have no tokens; a model needs at least one to go on")
    answers: dict[int, Answer] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    modes = [(model, model.training) for model in (models.student, models.teacher) if model is not None]
    try:
        for model, _ in modes:  # a model that checkpoints its activations refuses a cache while it is training
            model.eval()
        for start in range(0, len(prompts), batch_size):
            chosen = by_length[start : start + batch_size]
            noise = uniforms(seed, [keys[index] for index in chosen], draw, sampling.max_new_tokens)
            batch = _decode(models, [prompts[index] for index in chosen], noise, sampling, who)
            answers.update(zip(chosen, batch, strict=True))
            if progress is not None:
                progress(len(answers))
    finally:
        for model, training in modes:
            model.train(training)
    return [answers[index] for index in range(len(prompts))]


def _decode(
    models: Models,
    prompts: list[list[int]],
    noise: Tensor,  # (B, max_new_tokens)
    sampling: Sampling,
    who: Who,
) -> list[Answer]:
    device, B = models.device, len(prompts)
    width = max(map(len, prompts))
    ids = torch.full((B, width), models.pad_id)
    mask = torch.zeros(B, width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ids, mask, noise = ids.to(device), mask.to(device), noise.to(device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    decoders = _decoders(models, who)
    ends = torch.tensor(models.eos_ids, device=device)

    tokens = torch.full((B, sampling.max_new_tokens), models.pad_id, device=device)
    logprobs = torch.zeros(B, sampling.max_new_tokens, device=device)
    lengths = torch.full((B,), sampling.max_new_tokens, device=device)
    rows = torch.arange(B, device=device)  # of the batch as it was given, for those still decoded
    open_ = torch.ones(B, dtype=torch.bool, device=device)  # of those, the ones that have not ended
    fed = ids
    for t in range(sampling.max_new_tokens):
        logits = [decoder.step(fed, mask, positions) for decoder in decoders]
        token, logprob = choose(logits, noise[rows, t], sampling, ids)
        tokens[rows, t] = torch.where(open_, token, models.pad_id)
        logprobs[rows, t] = torch.where(open_, logprob.float(), 0.0)
        ended = open_ & torch.isin(token, ends)
        lengths[rows[ended]] = t + 1
        open_ = open_ & ~ended
        alive = int(open_.sum())
        if alive == 0 or t + 1 == sampling.max_new_tokens:
            break
        fed, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if sampling.no_repeat_ngram_size:
            ids = torch.cat([ids, fed], dim=1)
        if alive <= 0.75 * len(rows):  # copying the caches pays once a quarter of the rows is done
            kept = open_.nonzero().squeeze(-1)
            for decoder in decoders:
                decoder.keep(kept)
            rows, fed, positions, mask, ids = rows[kept], fed[kept], positions[kept], mask[kept], ids[kept]
            open_ = open_[kept]
    tokens, logprobs, lengths = tokens.cpu(), logprobs.cpu(), lengths.tolist()
    answers = []
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        response = tokens[row, :length].tolist()
        answers.append(Answer(prompt, response, response[-1] in models.eos_ids, logprobs[row, :length].clone()))
    return answers


def _decoders(models: Models, who: Who) -> list[Decoder]:
    chosen = {"student": [models.student], "teacher": [models.teacher], "mixture": [models.student, models.teacher]}[who]
    if any(model is None for model in chosen):
        raise ValueError(f"sample: who={who!r} needs a teacher, and there is none; set teacher.path")
    return [Decoder(model, models.vocab_size) for model in chosen]


def choose(
    logits: list[Tensor],  # (B, V) each: of one model, or of student and teacher
    noise: Tensor,  # (B,) float64 in [0, 1)
    sampling: Sampling,
    ids: Tensor,  # (B, L) what has been read and written, for the ban of repeated n-grams
) -> tuple[Tensor, Tensor]:  # (B,) int64 and (B,)
    """The next tokens and their log-probabilities: the inverse of the cumulative distribution at `noise`."""
    if sampling.no_repeat_ngram_size:
        logits = [NoRepeatNGramLogitsProcessor(sampling.no_repeat_ngram_size)(ids, scores) for scores in logits]
    if sampling.temperature == 0:
        mean = logits[0] if len(logits) == 1 else _mixed(logits, sampling.alpha)
        return mean.argmax(-1), torch.zeros(len(mean), device=mean.device)
    if sampling.temperature != 1:
        logits = [TemperatureLogitsWarper(sampling.temperature)(None, scores) for scores in logits]
    if sampling.top_k:
        logits = [TopKLogitsWarper(sampling.top_k)(None, scores) for scores in logits]
    if sampling.top_p < 1:
        logits = [TopPLogitsWarper(sampling.top_p)(None, scores) for scores in logits]
    probabilities = logits[0].softmax(-1) if len(logits) == 1 else _mixed(logits, sampling.alpha)
    # summed in float64: in fp32 the tail of a large vocabulary would be lost
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    threshold = (noise * cumulative[:, -1]).unsqueeze(-1)
    token = torch.searchsorted(cumulative, threshold, right=True).clamp(max=cumulative.shape[-1] - 1)
    return token.squeeze(-1), probabilities.gather(-1, token).squeeze(-1).log()


def _mixed(logits: list[Tensor], alpha: float) -> Tensor:  # (B, V) probabilities
    student, teacher = logits
    return torch.lerp(student.softmax(-1), teacher.softmax(-1).to(student.dtype), alpha)
