"""Answers sampled from the student, the teacher, or their mixture, token by token with all caches alive.

Noise is keyed by (seed, sample, draw, position), so that an answer depends on its prompt and key and not on the batch
it is drawn in (to the rounding of matrix products, which can differ with the shape of a batch).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from minillm import UserError
from minillm.distributed import collectives
from minillm.models.families import text_config
from minillm.rollout.local import coin_loop, growing_loop
from minillm.rollout.local.cuda_graphs import CudaGraphs
from minillm.rollout.local.decoder import check_positions
from minillm.rollout.local.decoding_check import (
    reads_blocks,
    replaces_rows,
    require_copied_rows,
    require_exact_decoding,
)
from minillm.rollout.local.graph_preconditions import require_cuda_graphs, rotary_by_length
from minillm.rollout.local.shared_prompts import in_batches, prompt_numbers
from minillm.rollout.local.static_loop import StaticLoop
from minillm.rollout.noise import coins, uniforms
from minillm.rollout.rollouts import Answer, Sampling, Who
from minillm.teachers.pair import Models, Role
from minillm.teachers.teacher import require_ability
from minillm.teachers.wire import SampleRequest

Decode = Callable[[Sequence[list[int]], Tensor, Sequence[Mapping[str, Tensor]]], list[Answer]]


class LocalRollouts:
    """The decode loops of this package over a pair of models: the protocol is minillm.rollout.rollouts.Rollouts.

    They read the very weights that are trained, so that a step changes what the next answers are drawn from.

    Args:
        models: the pair.
        cuda_graphs: replay a captured step for every token. Raises UserError where the device or a model cannot,
            and beside shared_coins.
        shared_coins: draw mixtures by a coin a position that all answers of a draw share (coin_loop.py), where sampling
            is neutral and no model chooses its rotary frequencies by the length of the texts. Otherwise both models run
            for every token.
        share_prompts: a prompt that several answers are asked to is read once for those that are decoded side by side, and
            for those that wait for their rows; beside a delta, and where ranks gather layers together, for each.
            Raises UserError beside cuda_graphs and shared_coins.
        refill: prompts that wait take the rows of answers that have ended, where the models and the loop can; otherwise
            one batch follows the other.
    """

    exact_noise = True
    mixtures = True

    def __init__(
        self,
        models: Models,
        *,
        cuda_graphs: bool = False,
        shared_coins: bool = False,
        share_prompts: bool = False,
        refill: bool = True,
    ):
        if cuda_graphs and shared_coins:
            raise UserError(
                "rollout.shared_coins has no step of fixed shapes, which rollout.cuda_graphs needs: choose one"
            )
        if share_prompts and (cuda_graphs or shared_coins):
            other = "cuda_graphs" if cuda_graphs else "shared_coins"
            raise UserError(
                f"rollout.answers_per_prompt above 1: the loop of rollout.{other} reads a prompt for every answer"
            )
        if cuda_graphs:
            require_cuda_graphs(models)
        self.models, self.cuda_graphs, self.shared_coins, self.refill = models, cuda_graphs, shared_coins, refill
        self.share_prompts = share_prompts
        self._blocks: dict[Role, bool] = {}  # of the models that were looked at: they read several tokens at a time
        self._rows_replaced: dict[Role, bool] = {}  # and take new prompts beside answers in progress

    def check(self, *roles: Role) -> None:
        """Look at whether these models answer as they score, each once; `sample` looks at those that it asks.

        Raises UserError for one that does not.
        """
        for role in roles:
            if role not in self._blocks and not self._asks_servers(role):
                require_exact_decoding(role, self.models.model(role))
                if role == "student" and self.models.delta is not None:
                    require_exact_decoding("delta", self.models.delta.model)
                if self.share_prompts:
                    require_copied_rows(role, self.models.model(role))
                self._blocks[role] = self.shared_coins and reads_blocks(self.models.model(role))

    def over(self, models: Models) -> "LocalRollouts":
        """The loops over the same weights with other ids in common; what was looked at is not looked at again."""
        other = LocalRollouts(
            models,
            cuda_graphs=self.cuda_graphs,
            shared_coins=self.shared_coins,
            share_prompts=self.share_prompts,
            refill=self.refill,
        )
        other._blocks, other._rows_replaced = self._blocks, self._rows_replaced
        return other

    def weights_changed(self) -> None:
        """Do nothing: there is no copy of the weights."""

    def sample(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        keys: Sequence[int],
        seed: int,
        draw: int = 0,
        who: Who = "student",
        batch_size: int,
        extras: Sequence[Mapping[str, Tensor]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Answer]:
        """One answer for each prompt: see minillm.rollout.rollouts.Rollouts. Of a mixture both models run only where
        both have a weight. Prompts of a like length are decoded together, the longest first.

        Raises UserError also for keys that do not match the prompts, an alpha without a mixture, sequences beyond a
        table of positions, and logits that are not finite.
        """
        roles = _roles(self.models, sampling, who)
        models = self.models.sampling(*roles)
        _check(models, prompts, sampling, keys, batch_size, roles)
        self.check(*roles)
        extras = [{}] * len(prompts) if extras is None else extras
        mine = collectives.rank_slice(len(prompts))
        todo = collectives.even_rank_slice(len(prompts)) if models.by_layers else mine
        order = sorted(todo, key=lambda index: len(prompts[index]), reverse=True)
        numbers: Sequence[int] = range(len(order))
        shares = self._shares(roles)
        if shares:
            like = prompt_numbers(prompts, extras)
            order.sort(key=lambda index: (-len(prompts[index]), like[index]))
            numbers = [like[index] for index in order]

        def noise(numbers: Iterable[int]) -> Tensor:  # of prompts in this order
            return uniforms(seed, [keys[order[number]] for number in numbers], draw, sampling.max_new_tokens)

        told = 0

        def report(done: int) -> None:
            nonlocal told
            of_all = min(len(prompts), done * collectives.world_size())
            if progress is not None and of_all > told:
                progress(of_all)
            told = of_all

        asked, shown = [prompts[index] for index in order], [extras[index] for index in order]
        ends = in_batches(numbers, batch_size)
        with models.reading(*roles):
            served = self._asks_servers(*roles)
            if not served and len(order) > batch_size and self._refills(models, sampling, roles):
                if self._captures(models, sampling, roles):
                    loop = _static_loop(models, sampling, roles, asked, batch_size)
                    decoded = loop.decode(asked, noise, shown, progress=report)
                else:
                    options = {"batch_size": batch_size, "progress": report, "share_prompts": shares}
                    decoded = growing_loop.decode(models, sampling, roles, asked, noise, shown, **options)
            else:
                if served:
                    batches = [order[start:end] for start, end in ends]
                    drawn = self._served(batches, prompts, sampling, keys, extras, seed=seed, draw=draw)
                else:
                    decode = self._loop(models, sampling, roles, asked, batch_size, shares=shares, seed=seed, draw=draw)
                    drawn = (
                        decode(asked[start:end], noise(range(start, end)), shown[start:end]) for start, end in ends
                    )
                decoded = []
                for of_batch in drawn:
                    decoded += of_batch
                    report(len(decoded))
        answers = dict(zip(order, decoded, strict=True))
        everyones = _of_all_ranks(prompts, [answers[index] for index in mine])
        for answer, seen in zip(everyones, extras, strict=True):
            answer.extras = seen
        for index, answer in answers.items():
            everyones[index].scores = answer.scores
        return everyones

    def _shares(self, roles: Iterable[str]) -> bool:
        # a delta follows the text of every row, and ranks that gather layers together must have batches alike
        followed = "student" in roles and self.models.delta is not None
        return self.share_prompts and not self.models.by_layers and not followed

    def _asks_servers(self, *roles: Role) -> bool:
        """True where the teacher alone samples, and its weights are in other processes."""
        return list(roles) == ["teacher"] and self.models.teacher is not None and self.models.teacher.model is None

    def _served(
        self,
        batches: Sequence[Sequence[int]],
        prompts: Sequence[list[int]],
        sampling: Sampling,
        keys: Sequence[int],
        extras: Sequence[Mapping[str, Tensor]],
        *,
        seed: int,
        draw: int,
    ) -> Iterator[list[Answer]]:
        """The answers to batches of prompts, by their places, from where the teacher is: drawn there by these very loops."""
        models = self.models
        if any(extras):
            raise UserError("a served teacher reads texts alone, and these prompts show pictures")
        requests = [
            SampleRequest(
                [list(prompts[index]) for index in chosen],
                [keys[index] for index in chosen],
                seed,
                draw,
                asdict(sampling) | {"alpha": 0.0},
                list(models.eos_ids),
                models.pad_id,
                models.vocab_size,
            )
            for chosen in batches
        ]
        for request, answers in zip(requests, models.teacher.sample(requests), strict=True):
            yield [
                Answer(prompt, ids, ended, logprobs)
                for prompt, (ids, ended, logprobs) in zip(request.prompts, answers, strict=True)
            ]

    def _loop(
        self,
        models: Models,  # that sample
        sampling: Sampling,
        roles: dict[str, float],
        prompts: Sequence[list[int]],  # of this rank
        batch_size: int,
        *,
        shares: bool,
        seed: int,
        draw: int,
    ) -> Decode:
        """The loop that decodes a batch: its prompts, its noise, (B, max_new_tokens) float64 on the CPU, and what they show."""
        if self.shared_coins and _coins_decide(models, sampling, roles):
            shared = coins(seed, draw, sampling.max_new_tokens)
            return partial(coin_loop.decode, models, sampling, self._blocks, shared)
        if prompts and self._captures(models, sampling, roles):
            loop = _static_loop(models, sampling, roles, prompts, batch_size)
            return lambda prompts, noise, extras: loop.decode(prompts, noise.__getitem__, extras)
        return partial(_decode_batch, models, sampling, roles, shares)

    def _captures(self, models: Models, sampling: Sampling, roles: Iterable[Role]) -> bool:
        """True where steps are captured as CUDA graphs: of models on the GPU, without n-grams, which the host looks up."""
        if not self.cuda_graphs or sampling.no_repeat_ngram_size or models.device.type != self.models.device.type:
            return False
        return all(models.elsewhere(role) is None for role in roles)

    def unrefilled(self, *roles: Role) -> str | None:
        """The reason for which answers of these models are drawn in batches one after the other; None where prompts that
        wait take the rows of answers that have ended. `sample` looks at the models that it asks, each once."""
        if self.models.by_layers:
            return "the ranks gather every layer together, so that none can read a prompt by itself"
        if "student" in roles and self.models.delta is not None:
            return "a delta is added to the student, and follows the texts of one batch"
        for role in roles:
            if self._asks_servers(role):
                continue  # which fill their batches as they do
            if role not in self._rows_replaced:
                self._rows_replaced[role] = replaces_rows(self.models.model(role))
            if not self._rows_replaced[role]:
                name = type(self.models.model(role)).__name__
                return f"the {role} ({name}) cannot read a prompt beside answers in progress"
        return None

    def _refills(self, models: Models, sampling: Sampling, roles: dict[str, float]) -> bool:
        # a coin says of one position in all rows which model is asked
        by_coins = self.shared_coins and _coins_decide(models, sampling, roles)
        return self.refill and not by_coins and self.unrefilled(*roles) is None


def _static_loop(
    models: Models, sampling: Sampling, roles: dict[str, float], prompts: Sequence[list[int]], batch_size: int
) -> StaticLoop:
    """The loop for these prompts. Its graphs live for this call alone, in which no weight moves."""
    sizes = {"batch": min(batch_size, len(prompts)), "longest": max(map(len, prompts))}
    return StaticLoop(models, sampling, roles, capture=CudaGraphs(models.device), **sizes)


def _decode_batch(
    models: Models,
    sampling: Sampling,
    roles: dict[str, float],
    shares: bool,
    prompts: Sequence[list[int]],
    noise: Tensor,  # (B, max_new_tokens) float64, CPU
    extras: Sequence[Mapping[str, Tensor]],
) -> list[Answer]:
    return growing_loop.decode(models, sampling, roles, prompts, noise.__getitem__, extras, share_prompts=shares)


def _coins_decide(models: Models, sampling: Sampling, roles: dict[str, float]) -> bool:
    """True for a mixture of which a coin can draw, and that a pass over what was drawn describes."""
    neutral = Sampling(sampling.max_new_tokens, alpha=sampling.alpha)
    return (
        len(roles) == 2
        and sampling == neutral
        and not any(rotary_by_length(text_config(models.model(role).config)) for role in roles)
    )


def _of_all_ranks(prompts: Sequence[list[int]], mine: list[Answer]) -> list[Answer]:
    """All answers on every rank, of which each has sampled a slice."""
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
    """The models that take part and their weights, which add up to 1."""
    if who not in ("student", "teacher", "mixture"):
        raise ValueError(f"who is {who!r}; it must be 'student', 'teacher' or 'mixture'")
    if who != "mixture" and sampling.alpha:
        raise ValueError(f"alpha is {sampling.alpha}, the teacher's weight in a mixture, but who is {who!r}")
    alpha = {"student": 0.0, "teacher": 1.0, "mixture": sampling.alpha}[who]
    if alpha:
        require_ability(
            models.teacher,
            "sample" if alpha == 1 else "mix",
            f"sampling with who={who!r} and a weight of {alpha} for the teacher",
        )
    roles = {"student": 1.0 - alpha, "teacher": alpha}
    return {role: weight for role, weight in roles.items() if weight}


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
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    for key, prompt in zip(keys, prompts, strict=True):
        if not prompt:
            raise UserError(f"the prompt with key {key} has no tokens, so nothing predicts its first answer token")
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens
    for role in roles:
        if role == "student" or models.teacher.model is not None:  # a server looks itself
            check_positions(models.model(role), longest - 1)  # the last token is sampled, never fed
    if "student" in roles and models.delta is not None and models.delta.translation is None:
        check_positions(models.delta.model, longest - 1)
