"""Answers side by side, as the growing decode loop has them: caches, what each row may see of them, and where it stands.

Every row's tokens end in the same column of the caches. That of a row's first token tells the rest: columns before it are
masked, and a token's position is its distance from it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from minillm.models.batch import join_extras
from minillm.rollout.local.decoder import Decoder, decoder_of
from minillm.rollout.local.delta_stream import SummedDecoder
from minillm.rollout.local.kv_cache import RoomyLayer, make_cache
from minillm.rollout.local.ngrams import NgramBan
from minillm.rollout.local.shared_prompts import Extras, copies_of, prompt_numbers
from minillm.rollout.local.token_drawing import Answer, PartialAnswers, Sampling, choose, pad_left
from minillm.teachers.pair import Models, Role

UNUSED_FRACTION = 0.25  # of the columns: when no row needs so many, dropping them repays the copy of the caches


class GrowingBatch:
    """Rows of answers; `numbers` says which answer is in each of them, and `live` which of these go on."""

    def __init__(
        self,
        models: Models,
        sampling: Sampling,
        roles: Mapping[str, float],  # the models that take part, and their weights
        numbers: Sequence[int],  # of the answers
        prompts: Sequence[list[int]],  # theirs
        noise: Tensor,  # (B, max_new_tokens) float64, CPU
        extras: Extras,
        *,
        refills: bool,  # it may be refilled: columns of the caches move
        share_prompts: bool = False,  # one that several answers are to is read once, and its rows of the caches are copied
    ):
        """Read the prompts and draw the first token of every answer."""
        self.refills, self.share_prompts = refills, share_prompts
        self.models, self.sampling, self.weights = models, sampling, list(roles.values())
        device, batch, width = models.device, len(prompts), max(map(len, prompts))
        self.room = width + sampling.max_new_tokens - 1
        self.decoders = [_decoder(models, role, self.room) for role in roles]
        self.bans = NgramBan(sampling.no_repeat_ngram_size, prompts) if sampling.no_repeat_ngram_size else None
        self.writing, self.noise = PartialAnswers(models, roles, batch, sampling.max_new_tokens), noise.to(device)
        self.slots = torch.arange(batch, device=device)  # where each row's answer is written
        self.fed = torch.zeros((batch, 1), dtype=torch.int64, device=device)  # what each row reads next
        self.column = width  # of the caches, where that goes
        self.numbers, self.prompts, self.live = list(numbers), list(prompts), [True] * batch
        self.begun = [width] * batch  # the column of each answer's first token
        self._look_over_rows()
        *read, copies = self._prompts(prompts, extras)
        logits = [one.forward(*read) for one in self.decoders]
        if copies is not None:
            for decoder in self.decoders:
                decoder.keep(copies)
            logits = [one[copies] for one in logits]
        self._draw(list(range(batch)), logits)

    def step(self) -> None:
        """Read the last token of every row, and draw another one for those that go on."""
        self._drop_columns()
        columns = torch.arange(self.column + 1, device=self.first.device)
        mask = (columns >= self.first).long()
        # those of rows that have ended stay within a table of positions
        positions = (self.column - self.first).clamp(max=self.room - 1)
        rows = self.going_on if any(self.live) else None  # none of this rank: the pass is for the others' sake
        logits = [decoder.forward(self.fed, mask, positions, {}, rows) for decoder in self.decoders]
        self.column += 1
        if rows is not None:
            self._draw(rows.tolist(), logits)

    def refill(self, numbers: Sequence[int], prompts: Sequence[list[int]], noise: Tensor, extras: Extras) -> None:
        """Other answers in the first rows that have ended, with the first token of each: no more than these rows, with
        prompts no longer than the tokens of a row that goes on."""
        rows = self._rows(live=False)[: len(prompts)]
        at = torch.tensor(rows, device=self.fed.device)
        *read, copies = self._prompts(prompts, extras)
        for row, number, prompt in zip(rows, numbers, prompts, strict=True):
            self.numbers[row], self.prompts[row], self.live[row], self.begun[row] = number, prompt, True, self.column
        self.noise[self.slots[at]] = noise.to(self.noise.device)
        self.writing.restart(self.slots[at])
        if self.bans is not None:
            self.bans.refill(rows, prompts)
        self._look_over_rows()
        self._draw(rows, [decoder.refill(at, *read, copies) for decoder in self.decoders])

    def answers(self) -> dict[int, Answer]:
        """Those of the rows that have ended, by their numbers."""
        rows = self._rows(live=False)
        slots = self.slots[torch.tensor(rows, dtype=torch.int64, device=self.fed.device)]
        found = self.writing.answers([self.prompts[row] for row in rows], slots)
        return {self.numbers[row]: answer for row, answer in zip(rows, found, strict=True)}

    def drop_ended(self) -> None:
        """Let the rows that have ended leave the batch."""
        rows = self._rows(live=True)
        kept = torch.tensor(rows, device=self.fed.device)
        for decoder in self.decoders:
            decoder.keep(kept)
        if self.bans is not None:
            self.bans.keep(rows)
        self.fed, self.slots = self.fed[kept], self.slots[kept]
        self.numbers, self.prompts, self.live, self.begun = (
            [part[row] for row in rows] for part in (self.numbers, self.prompts, self.live, self.begun)
        )
        self._look_over_rows()

    def _rows(self, *, live: bool) -> list[int]:
        return [row for row, going_on in enumerate(self.live) if going_on == live]

    def _look_over_rows(self) -> None:
        first = [begun - len(prompt) for begun, prompt in zip(self.begun, self.prompts, strict=True)]
        self.first = torch.tensor(first, device=self.fed.device)[:, None]  # (B, 1) the column of each row's first token
        self.going_on = torch.tensor(self._rows(live=True), dtype=torch.int64, device=self.fed.device)

    def _prompts(
        self, prompts: Sequence[list[int]], extras: Extras
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor], Tensor | None]:
        """The different prompts, (P, L) int64 three times, and what they show; and which of them each row has, (R,) int64."""
        copies = None
        if self.share_prompts:
            firsts, copies = copies_of(prompt_numbers(prompts, extras))
            prompts, extras = ([part[place] for place in firsts] for part in (prompts, extras))
        device, width = self.fed.device, max(map(len, prompts))
        ids, padding, positions = (part.to(device) for part in pad_left(prompts, width, self.models.pad_id))
        mask = (torch.arange(width, device=device) >= padding).long()
        shown = {name: one.to(device) for name, one in join_extras(extras).items()}
        return ids, mask, positions, shown, None if copies is None else copies.to(device)

    def _draw(self, rows: list[int], logits: list[Tensor]) -> None:  # (rows, V padded) fp32 a model
        """A token for each of these rows, which is to be read at `column`."""
        if self.bans is not None:
            logits = [self.bans.apply(rows, one) for one in logits]
        places = [self.column - self.begun[row] for row in rows]
        at, place = (torch.tensor(part, device=self.fed.device) for part in (rows, places))
        slots = self.slots[at]
        token, logprob = choose(logits, self.weights, self.sampling, self.noise[slots, place])
        self.writing.put(slots, place, token, logprob)
        self.fed[at] = token[:, None]
        if self.bans is not None:
            self.bans.append(rows, token.tolist())
        going_on = self.writing.going_on(slots, logprob, places)
        for row, more in zip(rows, going_on, strict=True):
            self.live[row] = more
        if not all(going_on):
            self._look_over_rows()

    def _drop_columns(self) -> None:
        """Forget the columns that no row needs, where they are many or the caches are full: then there is one at least."""
        if not self.refills:
            return
        live = self._rows(live=True)
        unused = min((self.begun[row] - len(self.prompts[row]) for row in live), default=0)
        if unused and (self.column == self.room or unused >= UNUSED_FRACTION * self.column):
            for decoder in self.decoders:
                decoder.drop_columns(unused)
            self.column -= unused
            self.begun = [begun - unused for begun in self.begun]
            self.first -= unused


def _decoder(models: Models, role: Role, room: int) -> Decoder | SummedDecoder:
    model = models.model(role)
    decoder = decoder_of(models, role, make_cache(model, lambda: RoomyLayer(room)))
    if role == "student" and models.delta is not None:
        return SummedDecoder(decoder, models.delta, room=room)
    return decoder
