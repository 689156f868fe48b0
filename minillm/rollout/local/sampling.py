"""Answers sampled from the student, the teacher, or their mixture, token by token with all caches alive.

Noise is keyed by (seed, sample, draw, position), so that an answer depends on its prompt and key and not on the batch
it is drawn in (to the rounding of matrix products, which can differ with the shape of a batch).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from minillm import UserError
from minillm.distributed import collectives
from minillm.models.pair import Models
from minillm.models.sharded import gathered
from minillm.rollout.local import growing_loop
from minillm.rollout.local.cuda_graphs import CudaGraphs
from minillm.rollout.local.decoder import check_positions, sampling_mode
from minillm.rollout.local.static_loop import StaticLoop
from minillm.rollout.local.token_drawing import Answer, Sampling
from minillm.rollout.noise import uniforms

Who = Literal["student", "teacher", "mixture"]


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

    Raises UserError for an empty prompt, a missing teacher, keys that do not match the prompts, an alpha without a
    mixture, sequences beyond a table of positions, logits that are not finite, and models or a device that
    `models.cuda_graphs` is not for.
    """
    roles = _roles(models, sampling, who)
    _check(models, prompts, sampling, keys, batch_size, roles)
    mine = collectives.rank_slice(len(prompts))
    todo = collectives.even_rank_slice(len(prompts)) if models.by_layers else mine
    order = sorted(todo, key=lambda index: len(prompts[index]), reverse=True)
    answers: dict[int, Answer] = {}
    taking_part = [getattr(models, role) for role in roles]
    with gathered(*taking_part, by_layers=models.by_layers), sampling_mode(taking_part):
        decode = _loop(models, sampling, roles, [prompts[index] for index in order], batch_size)
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            noise = uniforms(seed, [keys[index] for index in chosen], draw, sampling.max_new_tokens)
            decoded = decode([prompts[index] for index in chosen], noise)
            for index, answer in zip(chosen, decoded, strict=True):
                answers[index] = answer
            if progress is not None:
                progress(min(len(prompts), (start + len(chosen)) * collectives.world_size()))
    return _of_all_ranks(prompts, [answers[index] for index in mine])


def _loop(
    models: Models,
    sampling: Sampling,
    roles: dict[str, float],
    prompts: Sequence[list[int]],  # of this rank
    batch_size: int,
) -> Callable[[Sequence[list[int]], Tensor], list[Answer]]:
    """What decodes a batch: its prompts and its noise, (B, max_new_tokens) float64 on the CPU, to its answers."""
    # n-grams are looked up on the host; graphs live for this call alone, in which no weight moves
    if models.cuda_graphs and prompts and not sampling.no_repeat_ngram_size:
        sizes = {"batch": min(batch_size, len(prompts)), "longest": max(map(len, prompts))}
        return StaticLoop(models, sampling, roles, capture=CudaGraphs(models.device), **sizes).decode
    return partial(growing_loop.decode, models, sampling, roles)


def _of_all_ranks(prompts: Sequence[list[int]], mine: list[Answer]) -> list[Answer]:
    """Every rank samples its share of the prompts, and all of them get all answers."""
    if collectives.world_size() == 1:
        return mine
    parts = collectives.gather_tensors(
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
        for prompt, (ids, ended, logprobs) in zip(prompts, collectives.interleave(columns), strict=True)
    ]


def _roles(models: Models, sampling: Sampling, who: Who) -> dict[str, float]:
    """The models that take part and their shares, which add up to 1."""
    if who not in ("student", "teacher", "mixture"):
        raise UserError(f"who is {who!r}; it must be 'student', 'teacher' or 'mixture'")
    if who != "mixture" and sampling.alpha:
        raise UserError(f"alpha is {sampling.alpha}, the teacher's share of a mixture, but who is {who!r}")
    alpha = {"student": 0.0, "teacher": 1.0, "mixture": sampling.alpha}[who]
    roles = {"student": 1.0 - alpha, "teacher": alpha}
    if alpha and models.teacher is None:
        raise UserError(f"who={who!r} with a share of {alpha} for the teacher needs a teacher, and there is none")
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
        raise UserError(f"{len(prompts)} prompts, but {len(keys)} keys; every prompt needs a key for its noise")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    for key, prompt in zip(keys, prompts, strict=True):
        if not prompt:
            raise UserError(f"the prompt with key {key} has no tokens, so nothing predicts its first answer token")
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    for role in roles:
        check_positions(getattr(models, role), longest - 1)  # the last token is sampled, never fed
