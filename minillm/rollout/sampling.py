"""Answers sampled from the student, the teacher, or their mixture, token by token with all caches alive.

Noise is keyed by (seed, sample, draw, position), so that an answer depends on its prompt and key and not on the batch
it is drawn in (to the rounding of matrix products, which can differ with the shape of a batch).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minillm import distributed
from minillm.models.pair import Models
from minillm.models.sharded import readable
from minillm.rollout.decoder import Decoder, check_positions, sampling_mode
from minillm.rollout.distribution import Component, draw_tokens, likeliest_tokens, process
from minillm.rollout.ngrams import NgramBan
from minillm.rollout.noise import uniforms

Who = Literal["student", "teacher", "mixture"]

ENDED_SHARE = 0.25  # of a batch: when so many rows have ended, dropping them repays the copy of the caches


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The defaults are neutral: the model's own distribution.

    temperature 0 takes the likeliest token. top_k 0 and top_p 1 cut nothing. alpha is the teacher's share of a mixture.
    no_repeat_ngram_size bans tokens that would repeat an n-gram of prompt and answer; 0 bans none.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    alpha: float = 0.0
    no_repeat_ngram_size: int = 0

    def __post_init__(self):
        for name, right, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or above"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("alpha", 0 <= self.alpha <= 1, "between 0 and 1"),
            ("no_repeat_ngram_size", self.no_repeat_ngram_size >= 0, "0 (off) or above"),
        ):
            if not right:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be {wanted}")


@dataclass
class Answer:
    """A prompt and what was sampled for it."""

    prompt: list[int]
    response: list[int]  # with the EOS that ended it, if one did
    ended: bool
    # (T,) fp32, CPU: under the distribution that each token was drawn from; greedy: under the model at temperature 1
    logprobs: Tensor


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
    """One answer a prompt, in the order of the prompts. All ranks call it with the same prompts and get all answers.

    Args:
        keys: a number a prompt, which with `seed` and `draw` decides its noise. Two equal prompts with equal keys get
            equal answers.
        who: "mixture" draws from alpha * teacher + (1 - alpha) * student; both models run only where both have a share.
        batch_size: answers decoded side by side. Prompts of a like length go together, the longest first.
        progress: called after every batch with the number of answers that are done.

    Raises ValueError for an empty prompt, a missing teacher, keys that do not match the prompts, an alpha without a
    mixture, sequences beyond a table of positions, and logits that are not finite.
    """
    roles = _roles(models, sampling, who)
    _check(models, prompts, sampling, keys, batch_size, roles)
    mine = distributed.share(len(prompts))
    todo = distributed.even_share(len(prompts)) if models.by_layers else mine
    order = sorted(todo, key=lambda index: len(prompts[index]), reverse=True)
    answers: dict[int, Answer] = {}
    taking_part = [getattr(models, role) for role in roles]
    with readable(*taking_part, by_layers=models.by_layers), sampling_mode(taking_part):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            noise = uniforms(seed, [keys[index] for index in chosen], draw, sampling.max_new_tokens)
            decoded = _decode(models, [prompts[index] for index in chosen], sampling, noise, roles)
            for index, answer in zip(chosen, decoded, strict=True):
                answers[index] = answer
            if progress is not None:
                progress(min(len(prompts), (start + len(chosen)) * distributed.world_size()))
    return _of_all_ranks(prompts, [answers[index] for index in mine])


def _of_all_ranks(prompts: Sequence[list[int]], mine: list[Answer]) -> list[Answer]:
    """Every rank samples its share of the prompts, and all of them get all answers."""
    if distributed.world_size() == 1:
        return mine
    parts = distributed.gather_tensors(
        {
            "lengths": torch.tensor([len(answer.response) for answer in mine], dtype=torch.int64),
            "ids": torch.tensor([token for answer in mine for token in answer.response], dtype=torch.int64),
            "ended": torch.tensor([answer.ended for answer in mine], dtype=torch.bool),
            "logprobs": torch.cat([torch.empty(0), *(answer.logprobs for answer in mine)]),
        }
    )
    columns = [
        list(
            zip(
                part["ids"].split(part["lengths"].tolist()) if len(part["lengths"]) else (),
                part["ended"].tolist(),
                part["logprobs"].split(part["lengths"].tolist()) if len(part["lengths"]) else (),
                strict=True,
            )
        )
        for part in parts
    ]
    return [
        Answer(list(prompt), ids.tolist(), ended, logprobs.clone())
        for prompt, (ids, ended, logprobs) in zip(prompts, distributed.interleave(columns), strict=True)
    ]


def _roles(models: Models, sampling: Sampling, who: Who) -> dict[str, float]:
    """The models that take part and their shares, which add up to 1."""
    if who not in ("student", "teacher", "mixture"):
        raise ValueError(f"who is {who!r}; it must be 'student', 'teacher' or 'mixture'")
    if who != "mixture" and sampling.alpha:
        raise ValueError(f"alpha is {sampling.alpha}, the teacher's share of a mixture, but who is {who!r}")
    alpha = {"student": 0.0, "teacher": 1.0, "mixture": sampling.alpha}[who]
    roles = {"student": 1.0 - alpha, "teacher": alpha}
    if alpha and models.teacher is None:
        raise ValueError(f"who={who!r} with a share of {alpha} for the teacher needs a teacher, and there is none")
    return {role: share for role, share in roles.items() if share}


def _check(
    models: Models,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    keys: Sequence[int],
    batch_size: int,
    roles: dict[str, float],
) -> None:
    if len(keys) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(keys)} keys; every prompt needs a key for its noise")
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    for key, prompt in zip(keys, prompts, strict=True):
        if not prompt:
            raise ValueError(f"the prompt with key {key} has no tokens, so nothing predicts its first answer token")
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    for role in roles:
        check_positions(getattr(models, role), longest - 1)  # the last token is sampled, never fed


def _decode(
    models: Models,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    noise: Tensor,  # (B, max_new_tokens) float64, CPU
    roles: dict[str, float],
) -> list[Answer]:
    """The decode loop of one batch. Rows run on until all have ended; those that have ended leave in groups."""
    device, batch, steps = models.device, len(prompts), sampling.max_new_tokens
    width = max(map(len, prompts))
    room = width + steps - 1
    decoders = [Decoder(getattr(models, role), vocab_size=models.vocab_size, room=room) for role in roles]
    shares = list(roles.values())
    bans = NgramBan(sampling.no_repeat_ngram_size, prompts) if sampling.no_repeat_ngram_size else None
    ends = torch.tensor(models.eos_ids, dtype=torch.int64, device=device)
    noise = noise.to(device)

    fed, mask, position = (part.to(device) for part in _pad_left(prompts, width, room, models.pad_id))
    tokens = torch.full((batch, steps), models.pad_id, device=device)
    logprobs = torch.zeros((batch, steps), dtype=torch.float64, device=device)
    lengths = torch.full((batch,), steps, device=device)
    ended = torch.zeros(batch, dtype=torch.bool, device=device)
    rows = torch.arange(batch, device=device)  # of the answers, still in the batch
    running = torch.ones(batch, dtype=torch.bool, device=device)  # of `rows`

    for step in range(steps):
        logits = [decoder.forward(fed, mask[:, : width + step], position) for decoder in decoders]
        if bans is not None:
            logits = [bans.apply(one) for one in logits]
        token, logprob = _choose(logits, shares, sampling, noise[:, step])
        tokens[rows, step], logprobs[rows, step] = token, logprob
        is_end = torch.isin(token, ends) & running
        running &= ~is_end
        finished = rows[is_end]
        ended[finished], lengths[finished] = True, step + 1
        left, broken = torch.stack((running.sum(), (~logprob.isfinite()).sum())).tolist()
        if broken:
            raise ValueError(
                f"the logits at token {step} of {broken} answer(s) are not finite: the weights of {' or '.join(roles)} hold "
                "NaN or infinity, or overflow in their dtype"
            )
        if step + 1 == steps or not (distributed.anywhere(left > 0) if models.by_layers else left):
            break
        if bans is not None:
            bans.append(token.tolist())
        fed, position = token[:, None], position[:, -1:] + 1
        if left and len(rows) - left >= ENDED_SHARE * len(rows):
            kept = running.nonzero()[:, 0]
            for decoder in decoders:
                decoder.keep(kept)
            if bans is not None:
                bans.keep(kept.tolist())
            fed, mask, position, noise, rows, running = (
                part[kept] for part in (fed, mask, position, noise, rows, running)
            )
    return _answers(prompts, tokens, logprobs, lengths, ended)


def _pad_left(
    prompts: Sequence[list[int]], width: int, room: int, pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:  # (B, width) ids, (B, room) mask, (B, width) positions
    """Prompts that all end in the last column. The mask reaches over what will be sampled."""
    padding = torch.tensor([[width - len(prompt)] for prompt in prompts])
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = (torch.arange(room) >= padding).long()
    return ids, mask, (torch.arange(width) - padding).clamp_min_(0)


def _choose(
    logits: list[Tensor],  # (B, V padded) fp32 a model, overwritten
    shares: list[float],
    sampling: Sampling,
    uniform: Tensor,  # (B,) float64
) -> tuple[Tensor, Tensor]:  # (B,) int64, (B,) float64
    if sampling.temperature == 0:
        return likeliest_tokens(logits, shares)
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    components = [Component(process(one, **options), share) for one, share in zip(logits, shares, strict=True)]
    return draw_tokens(components, uniform)


def _answers(
    prompts: Sequence[list[int]],
    tokens: Tensor,  # (B, steps) int64
    logprobs: Tensor,  # (B, steps) float64
    lengths: Tensor,  # (B,) int64
    ended: Tensor,  # (B,) bool
) -> list[Answer]:
    tokens, logprobs = tokens.cpu(), logprobs.float().cpu()
    columns = zip(prompts, tokens, logprobs, lengths.tolist(), ended.tolist(), strict=True)
    return [
        Answer(list(prompt), ids[:length].tolist(), end, values[:length].clone())
        for prompt, ids, values, length, end in columns
    ]
