"""The common part of the decode loops: drawing a token, and the answers as they are written, on the models' device."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from minillm import UserError
from minillm.rollout.local.distribution import Component, draw_tokens, likeliest_tokens, padded_size, process
from minillm.rollout.rollouts import Answer, Sampling
from minillm.teachers.pair import Models


class PartialAnswers:
    """The answers of a batch as they grow. The host waits for the device in `look` and `answers` alone."""

    def __init__(self, models: Models, roles: Iterable[str], batch: int, steps: int):
        self.roles, device = tuple(roles), models.device
        self.tokens = torch.full((batch, steps), models.pad_id, device=device)
        self.logprobs = torch.zeros((batch, steps), dtype=torch.float64, device=device)
        self.lengths = torch.full((batch,), steps, device=device)
        self.ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self.places = torch.arange(steps, device=device)
        is_end = torch.zeros(padded_size(models.vocab_size), dtype=torch.bool)
        is_end[list(models.eos_ids)] = True
        self.is_end = is_end.to(device)  # a table: torch.isin would have to know how many different ids there are

    def clear(self, answers: int) -> None:
        """Ready for so many other answers; the rows beyond them count as ended before their first token."""
        rows = torch.arange(len(self.ended), device=self.ended.device)
        self.ended.copy_(rows >= answers)
        self.lengths.copy_(torch.where(self.ended, 0, len(self.places)))

    def put(
        self,
        rows: Tensor,  # (R,) int64, of the answers
        place: Tensor,  # (1,) or (R,) int64, the token's in an answer
        token: Tensor,  # (R,) int64
        logprob: Tensor,  # (R,) float64
    ) -> None:
        """A token a row. What is put after an answer's end changes neither its length nor that it ended."""
        self.tokens[rows, place] = token
        self.logprobs[rows, place] = logprob
        ended = self.ended[rows]
        ends_now = self.is_end[token] & ~ended
        self.lengths[rows] = torch.where(ends_now, place + 1, self.lengths[rows])
        self.ended[rows] = ended | ends_now

    def look(self, first: int, end: int) -> int:
        """The number of answers that go on after the tokens from `first` up to `end`.

        Raises UserError where one of these tokens of an answer was drawn from logits that are not finite.
        """
        counted = self.places[first:end] < self.lengths[:, None]
        broken = (~self.logprobs[:, first:end].isfinite() & counted).sum(0)
        going_on, *broken = torch.cat(((~self.ended).sum()[None], broken)).tolist()
        for token, answers in enumerate(broken, first):
            if answers:
                raise self.not_finite(token, answers)
        return going_on

    def rows_ended(self, drawn: Sequence[int]) -> list[bool]:  # tokens of each row's answer, 0 for a row that has none
        """For each row whether an end is among its tokens.

        Raises UserError where one of the tokens of an answer was drawn from logits that are not finite.
        """
        counted = self.places < torch.minimum(self.lengths, torch.tensor(drawn, device=self.lengths.device))[:, None]
        broken = (~self.logprobs.isfinite() & counted).sum(0)
        found = torch.cat((self.ended.long(), broken)).tolist()
        for token, answers in enumerate(found[len(drawn) :]):
            if answers:
                raise self.not_finite(token, answers)
        return [end == 1 for end in found[: len(drawn)]]

    def going_on(self, rows: Tensor, logprob: Tensor, places: Sequence[int]) -> list[bool]:  # (R,) int64, (R,) float64
        """For each of these answers, whether it goes on after the token that was put at its place.

        Raises UserError where one of these tokens was drawn from logits that are not finite.
        """
        ended, finite = torch.stack((self.ended[rows], logprob.isfinite())).tolist()
        if not all(finite):
            broken = [place for place, sound in zip(places, finite, strict=True) if not sound]
            raise self.not_finite(min(broken), broken.count(min(broken)))
        last = len(self.places) - 1
        return [not end and place < last for end, place in zip(ended, places, strict=True)]

    def not_finite(self, token: int, answers: int) -> UserError:
        """The error for so many answers whose token at this place has no probability."""
        return UserError(
            f"the logits at token {token} of {answers} answer(s) are not finite: the weights of "
            f"{' or '.join(self.roles)} hold NaN or infinity, or overflow in their dtype"
        )

    def restart(self, rows: Tensor) -> None:  # (R,) int64, of the answers
        """Ready for other answers in these rows."""
        self.lengths[rows] = len(self.places)
        self.ended[rows] = False

    def answers(self, prompts: Sequence[list[int]], rows: Tensor | None = None) -> list[Answer]:  # (R,) int64
        """The answers of these rows, or of the first ones, one a prompt."""
        if rows is None:
            rows = torch.arange(len(prompts), device=self.ended.device)
        parts = (self.tokens, self.logprobs, self.lengths, self.ended)
        tokens, logprobs, lengths, ended = (part[rows].cpu() for part in parts)
        columns = zip(prompts, tokens, logprobs.float(), lengths.tolist(), ended.tolist(), strict=True)
        return [
            Answer(list(prompt), ids[:length].tolist(), end, values[:length].clone())
            for prompt, ids, values, length, end in columns
        ]


def choose(
    logits: list[Tensor],  # (B, V padded) fp32 a model, overwritten
    weights: Sequence[float],
    sampling: Sampling,
    uniform: Tensor,  # (B,) float64
) -> tuple[Tensor, Tensor]:  # (B,) int64, (B,) float64
    """A token a row and its log-probability, without a look at either from the host."""
    if sampling.temperature == 0:
        return likeliest_tokens(logits, weights)
    options = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    components = [Component(process(one, **options), weight) for one, weight in zip(logits, weights, strict=True)]
    return draw_tokens(components, uniform)


def pad_left(
    prompts: Sequence[list[int]], width: int, pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:  # (B, width) ids, (B, 1) padding, (B, width) positions
    """Prompts that all end in the last column, how many columns before each are padding, and positions without it."""
    padding = torch.tensor([[width - len(prompt)] for prompt in prompts])
    ids = torch.tensor([[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    return ids, padding, (torch.arange(width) - padding).clamp_min_(0)
