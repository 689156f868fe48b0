"""Answers side by side, as the growing decode loop has them: caches, what each row may see of them, and where it stands.

Every row's tokens end in the same column of the caches. That of a row's first token tells the rest: columns before it are
masked, and a token's position is its distance from it.

Prompts that wait for a row are read several at a time, in caches of their own, and the first token of their answers is
drawn there. A row that has ended takes one of them before the next step, so that none sits idle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.models.batch import join_extras
from minillm.rollout.local.decoder import Decoder, ReadPrompts, decoder_of
from minillm.rollout.local.delta_stream import SummedDecoder
from minillm.rollout.local.kv_cache import RoomyLayer, make_cache
from minillm.rollout.local.ngrams import NgramBan
from minillm.rollout.local.shared_prompts import Extras, copies_of, prompt_numbers
from minillm.rollout.local.token_drawing import Answer, PartialAnswers, Sampling, choose, pad_left
from minillm.teachers.pair import Models, Role

UNUSED_FRACTION = 0.25  # of the columns: when no row needs so many, dropping them repays the copy of the caches


@dataclass
class _Waiting:
    """Answers whose prompts are read and whose first tokens are drawn, without a row to go on in."""

    read: list[ReadPrompts]  # of each model
    slots: list[int]  # of these answers
    places: Tensor  # (R,) int64, the row of each one's prompt in `read`
    tokens: Tensor  # (R,) int64, the first of each


class GrowingBatch:
    """Rows of answers. Each is written in a slot, which it keeps until it is collected; `live` says which rows go on."""

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
        waiting: int = 0,  # the most answers that will wait for a row at a time; above 0 columns of the caches move
        share_prompts: bool = False,  # one that several answers are to is read once, and its rows of the caches are copied
    ):
        """Read the prompts and draw the first token of every answer."""
        self.refills, self.share_prompts = waiting > 0, share_prompts
        self.models, self.sampling, self.weights = models, sampling, list(roles.values())
        device, batch, width = models.device, len(prompts), max(map(len, prompts))
        self.room = width + sampling.max_new_tokens - 1
        self.decoders = [_decoder(models, role, self.room) for role in roles]
        self.bans = NgramBan(sampling.no_repeat_ngram_size) if sampling.no_repeat_ngram_size else None
        slots = batch + waiting
        self.writing = PartialAnswers(models, roles, slots, sampling.max_new_tokens)
        self.noise = torch.empty((slots, sampling.max_new_tokens), dtype=torch.float64, device=device)
        self.free, self.ended = list(range(slots)), []  # slots without an answer, and those of answers that have ended
        self.asked: dict[int, tuple[int, list[int]]] = {}  # the number of the answer in a slot, and its prompt
        self.waiting: _Waiting | None = None
        self.column = width  # of the caches, where what is fed goes
        self.fed = torch.zeros((batch, 1), dtype=torch.int64, device=device)  # what each row reads next
        self.slots = self._begin(numbers, prompts, noise)  # where each row's answer is written
        self.live, self.begun = [True] * batch, [width] * batch  # the column of each answer's first token
        self.first = [width - len(prompt) for prompt in prompts]  # and of its prompt's
        self._note_live_rows()
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
        columns = torch.arange(self.column + 1, device=self.fed.device)
        first = torch.tensor(self.first, device=self.fed.device)[:, None]
        mask = (columns >= first).long()
        # those of rows that have ended stay within a table of positions
        positions = (self.column - first).clamp(max=self.room - 1)
        rows = self.going_on if any(self.live) else None  # none of this rank: the pass is for the others' sake
        logits = [decoder.forward(self.fed, mask, positions, {}, rows) for decoder in self.decoders]
        self.column += 1
        if rows is not None:
            self._draw(rows.tolist(), logits)

    def read_ahead(self, numbers: Sequence[int], prompts: Sequence[list[int]], noise: Tensor, extras: Extras) -> None:
        """Read prompts while none waits, no longer than the columns in use, and draw the first token of their answers."""
        slots = self._begin(numbers, prompts, noise)
        *inputs, copies = self._prompts(prompts, extras)
        # each model's logits lie in memory of its own, which the next ones are written into
        read, logits = zip(*(decoder.read(*inputs) for decoder in self.decoders), strict=True)
        if copies is None:
            copies = torch.arange(len(slots), device=self.fed.device)
        else:
            logits = [one[copies] for one in logits]
        token, going_on = self._write(slots, [0] * len(slots), list(logits))
        kept = [place for place, more in enumerate(going_on) if more]
        if kept:
            at = torch.tensor(kept, device=self.fed.device)
            self.waiting = _Waiting(list(read), [slots[place] for place in kept], copies[at], token[at])

    def fill_rows(self) -> None:
        """Let answers that wait go on in rows that have ended, as many as there are of both."""
        waiting = self.waiting
        rows = self._rows(live=False)[: len(waiting.slots)]
        taken, at = len(rows), torch.tensor(rows, device=self.fed.device)
        # the longest prompt that was read with them may have come and gone, and the columns that it needed with it
        longest = max(len(self.asked[slot][1]) for slot in waiting.slots[:taken])
        for decoder, read in zip(self.decoders, waiting.read, strict=True):
            decoder.refill(at, read, waiting.places[:taken], longest)
        self.fed[at] = waiting.tokens[:taken, None]
        for row, slot in zip(rows, waiting.slots, strict=False):
            self.slots[row], self.live[row], self.begun[row] = slot, True, self.column
            self.first[row] = self.column - len(self.asked[slot][1])
        self._note_live_rows()
        left = (waiting.slots[taken:], waiting.places[taken:], waiting.tokens[taken:])
        self.waiting = _Waiting(waiting.read, *left) if left[0] else None

    def collect(self) -> dict[int, Answer]:
        """The answers that have ended since the last time, by their numbers; their slots are free for others."""
        slots, self.ended = self.ended, []
        asked = [self.asked.pop(slot) for slot in slots]
        at = torch.tensor(slots, dtype=torch.int64, device=self.fed.device)
        answers = self.writing.answers([prompt for _, prompt in asked], at)
        self.free += slots
        return {number: answer for (number, _), answer in zip(asked, answers, strict=True)}

    def drop_ended(self) -> None:
        """Let the rows that have ended leave the batch."""
        rows = self._rows(live=True)
        kept = torch.tensor(rows, device=self.fed.device)
        for decoder in self.decoders:
            decoder.keep(kept)
        self.fed = self.fed[kept]
        self.slots, self.live, self.begun, self.first = (
            [part[row] for row in rows] for part in (self.slots, self.live, self.begun, self.first)
        )
        self._note_live_rows()

    def _rows(self, *, live: bool) -> list[int]:
        return [row for row, going_on in enumerate(self.live) if going_on == live]

    def _note_live_rows(self) -> None:
        self.going_on = torch.tensor(self._rows(live=True), dtype=torch.int64, device=self.fed.device)

    def _begin(self, numbers: Sequence[int], prompts: Sequence[list[int]], noise: Tensor) -> list[int]:
        """Slots for answers."""
        slots, self.free = self.free[: len(numbers)], self.free[len(numbers) :]
        at = torch.tensor(slots, device=self.fed.device)
        self.noise[at] = noise.to(self.noise.device)
        self.writing.restart(at)
        self.asked |= zip(slots, zip(numbers, prompts, strict=True), strict=True)
        if self.bans is not None:
            self.bans.begin(slots, prompts)
        return slots

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
        places = [self.column - self.begun[row] for row in rows]
        token, going_on = self._write([self.slots[row] for row in rows], places, logits)
        self.fed[torch.tensor(rows, device=self.fed.device)] = token[:, None]
        for row, more in zip(rows, going_on, strict=True):
            self.live[row] = more
        if not all(going_on):
            self._note_live_rows()

    def _write(
        self,
        slots: list[int],
        places: list[int],  # of the tokens, in these answers
        logits: list[Tensor],  # (slots, V padded) fp32 a model
    ) -> tuple[Tensor, list[bool]]:  # (slots,) int64
        """A token for each of these answers, and which of them go on."""
        if self.bans is not None:
            logits = [self.bans.apply(slots, one) for one in logits]
        at, place = (torch.tensor(part, device=self.fed.device) for part in (slots, places))
        token, logprob = choose(logits, self.weights, self.sampling, self.noise[at, place])
        self.writing.put(at, place, token, logprob)
        if self.bans is not None:
            self.bans.append(slots, token.tolist())
        going_on = self.writing.going_on(at, logprob, places)
        self.ended += [slot for slot, more in zip(slots, going_on, strict=True) if not more]
        return token, going_on

    def _drop_columns(self) -> None:
        """Forget the columns that no row needs, where they are many or the caches are full: then there is one at least."""
        if not self.refills:
            return
        live = self._rows(live=True)
        unused = min((self.first[row] for row in live), default=0)
        if unused and (self.column == self.room or unused >= UNUSED_FRACTION * self.column):
            for decoder in self.decoders:
                decoder.drop_columns(unused)
            self.column -= unused
            self.begun, self.first = ([column - unused for column in part] for part in (self.begun, self.first))


def _decoder(models: Models, role: Role, room: int) -> Decoder | SummedDecoder:
    model = models.model(role)
    decoder = decoder_of(models, role, make_cache(model, lambda: RoomyLayer(room)))
    if role == "student" and models.delta is not None:
        return SummedDecoder(decoder, models.delta, room=room)
    return decoder
