"""The decode loop of fixed shapes: a step reads and writes the same memory every time, so that a CUDA graph can hold it.

Where to write, which keys are seen, positions, tokens, log-probabilities and what has ended lie on the device and are
moved on by the step itself; no number of it comes from the host. Attention runs over the columns in use rounded up to
whole buckets, so that there is a step, and a graph, for each number of buckets.

Between steps the host looks at which rows have ended. Prompts that wait were read beside the steps, in caches of their own;
one that takes a row has its keys and values copied there, and where the row stands is set back. A row that has ended and
that nobody takes runs on within its own memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm import UserError
from minillm.rollout.local.decoder import Decoder, ReadPrompts, decoder_of
from minillm.rollout.local.graph_preconditions import require_static_shapes
from minillm.rollout.local.kv_cache import StaticLayer, make_cache
from minillm.rollout.local.shared_prompts import in_readings, prompts_ahead
from minillm.rollout.local.token_drawing import Answer, PartialAnswers, Sampling, choose, pad_left
from minillm.teachers.pair import Models

BUCKET = 128  # columns of a cache
LOOK = 16  # steps from one look of the host at which rows have ended to the next
LOOK_WAITING = 4  # the same while prompts wait for rows: a look has the device idle for less than a step

Capture = Callable[[Callable[[], None]], Callable[[], None]]  # runs a step, and returns what runs it again


@dataclass
class _Row:
    """A row as the host knows it."""

    number: int | None = None  # of its answer; None: it has none
    prompt: int = 0  # columns
    drawn: int = 0  # tokens


@dataclass
class _Waiting:
    """Answers whose prompts are read and whose first tokens are drawn, without a row to go on in."""

    numbers: list[int]
    read: list[ReadPrompts]  # of each model
    places: Tensor  # (R,) int64, the row of each one's prompt in `read`
    padding: Tensor  # (R, 1) int64, columns before the prompts
    width: int  # columns of the prompts with that
    noise: Tensor  # (R, max_new_tokens) float64
    tokens: Tensor  # (R,) int64, the first of each
    logprobs: Tensor  # (R,) float64, theirs

    def part(self, which: slice) -> "_Waiting":
        """Some of the answers."""
        rows = (self.places, self.padding, self.noise, self.tokens, self.logprobs)
        places, padding, noise, tokens, logprobs = (one[which] for one in rows)
        return _Waiting(self.numbers[which], self.read, places, padding, self.width, noise, tokens, logprobs)


class StaticLoop:
    """Decodes `batch` prompts side by side, and the ones after them in rows that have ended, all in the memory of the first."""

    def __init__(
        self,
        models: Models,
        sampling: Sampling,
        roles: Mapping[str, float],  # the models that take part, and their weights
        *,
        batch: int,
        longest: int,  # tokens of the longest prompt
        capture: Capture,
    ):
        """Raises UserError for a model that has no such step, and for sampling that bans n-grams."""
        if sampling.no_repeat_ngram_size:
            raise UserError("no_repeat_ngram_size reads every token on the host; it has no step of fixed shapes")
        self.sampling, self.weights, self.capture, self.pad_id = sampling, list(roles.values()), capture, models.pad_id
        self.room = static_room(longest, sampling.max_new_tokens)
        self.last_position = longest + sampling.max_new_tokens - 2  # the last token is never fed
        device = models.device
        # where the next token of each row goes, in the caches, and where its last one went, in its answer
        self.column = torch.zeros(batch, dtype=torch.int64, device=device)
        self.place = torch.zeros(batch, dtype=torch.int64, device=device)
        self.fed = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.fed)
        self.noise = torch.zeros((batch, sampling.max_new_tokens), dtype=torch.float64, device=device)
        self.rows = torch.arange(batch, device=device)
        self.writing = PartialAnswers(models, roles, batch, sampling.max_new_tokens)
        self.host: list[_Row] = []
        self.decoders: list[Decoder] = []
        self.layers: list[StaticLayer] = []  # of all caches
        self.masks: dict[torch.dtype, Tensor] = {}  # (B, 1, 1, room), added to the scores
        for role in roles:
            model = models.model(role)
            require_static_shapes(role, model)
            cache = make_cache(model, lambda: StaticLayer(self.room, self.column))
            self.decoders.append(decoder_of(models, role, cache))
            self.layers += cache.layers
            self.masks[model.dtype] = torch.zeros((batch, 1, 1, self.room), dtype=model.dtype, device=device)
        self.used = 0  # columns
        self.again: dict[int, Callable[[], None]] = {}  # the steps that were run already, by columns

    def decode(
        self,
        prompts: Sequence[list[int]],
        noise: Callable[[list[int]], Tensor],  # from numbers of prompts to (any, max_new_tokens) float64, CPU
        extras: Sequence[Mapping[str, Tensor]] = (),
        *,
        progress: Callable[[int], None] | None = None,  # called with the number of answers that are done
    ) -> list[Answer]:
        """An answer for each prompt. Raises UserError for logits that are not finite, and for prompts with pictures."""
        if any(extras):
            raise UserError(
                "rollout.cuda_graphs: prompts that show pictures have no step of static shapes; leave it out"
            )
        first = min(len(prompts), len(self.rows))
        readings = in_readings(range(len(prompts)), first, prompts_ahead(len(self.rows)))
        self.begin(prompts[:first], noise(list(range(first))))
        answers: dict[int, Answer] = {}
        waiting: _Waiting | None = None
        while True:
            self._collect(prompts, answers)
            if progress is not None:
                progress(len(answers))
            while (waiting or readings) and any(row.number is None for row in self.host):
                if not waiting:
                    numbers = list(readings.pop(0))
                    waiting = self._read_ahead(numbers, prompts, noise(numbers), answers)
                if waiting:
                    waiting = self._fill_rows(waiting)
            live = [row for row in self.host if row.number is not None]
            if not live:
                return [answers[number] for number in range(len(prompts))]
            look = LOOK_WAITING if waiting or readings else LOOK
            # a row that is full is looked at before it runs on
            for _ in range(min(look, *(self.sampling.max_new_tokens - row.drawn for row in live))):
                self._run(-(-max(row.prompt + row.drawn for row in live) // BUCKET) * BUCKET)
                for row in live:
                    row.drawn += 1

    def begin(self, prompts: Sequence[list[int]], noise: Tensor) -> None:
        """Read the prompts and draw the first token of every answer; shapes depend on the prompts here."""
        filled = [min(row, len(prompts) - 1) for row in range(len(self.rows))]  # the last prompt fills what is left
        width, device = max(map(len, prompts)), self.rows.device
        parts = pad_left([prompts[row] for row in filled], width, self.pad_id)
        ids, padding, positions = (part.to(device) for part in parts)
        columns = torch.arange(self.room, device=device)
        seen = (columns >= padding) & (columns < width)  # (B, room)
        for dtype, mask in self.masks.items():
            mask[:, 0, 0] = torch.where(seen, 0.0, torch.finfo(dtype).min)
        self.noise.copy_(noise[filled])
        # `_draw` moves them on to where the first token of each answer goes
        self.position.copy_(positions[:, -1:])
        self.column.fill_(width - 1)
        self.place.fill_(-1)
        self.host = [_Row(row, width, 1) if row < len(prompts) else _Row() for row in range(len(self.rows))]
        self.writing.clear(len(prompts))
        for layer in self.layers:
            if layer.is_initialized:
                layer.clear()
        self.used = 0
        self._draw([decoder.forward(ids, seen[:, :width].long(), positions) for decoder in self.decoders])

    def step(self) -> None:
        """A token for every row, from and to the memory of this loop alone."""
        for mask in self.masks.values():
            mask.scatter_(-1, self.column[:, None, None, None], 0.0)
        self._draw(
            [
                decoder.forward(self.fed, self.masks[decoder.model.dtype][..., : self.used], self.position)
                for decoder in self.decoders
            ]
        )

    def _draw(self, logits: list[Tensor]) -> None:  # (B, V padded) fp32 a model
        # a row that has ended stays within its memory, and within a table of positions
        self.place.add_(1).clamp_(max=self.sampling.max_new_tokens - 1)
        self.column.add_(1).clamp_(max=self.room - 1)
        self.position.add_(1).clamp_(max=self.last_position)
        uniform = self.noise.gather(1, self.place[:, None])[:, 0]
        token, logprob = choose(logits, self.weights, self.sampling, uniform)
        self.writing.put(self.rows, self.place, token, logprob)
        self.fed.copy_(token[:, None])

    def _collect(self, prompts: Sequence[list[int]], answers: dict[int, Answer]) -> None:
        """Note the answers that have ended; their rows have none any more."""
        ended = self.writing.rows_ended([0 if row.number is None else row.drawn for row in self.host])
        steps = self.sampling.max_new_tokens
        rows = [
            place
            for place, (row, end) in enumerate(zip(self.host, ended, strict=True))
            if row.number is not None and (end or row.drawn == steps)
        ]
        if not rows:
            return
        numbers = [self.host[row].number for row in rows]
        at = torch.tensor(rows, device=self.rows.device)
        answers |= zip(numbers, self.writing.answers([prompts[number] for number in numbers], at), strict=True)
        for row in rows:
            self.host[row] = _Row()

    def _read_ahead(
        self,
        numbers: list[int],
        prompts: Sequence[list[int]],
        noise: Tensor,  # (R, max_new_tokens) float64, CPU
        answers: dict[int, Answer],
    ) -> _Waiting | None:
        """Read these prompts and draw the first token of each answer; those of one token are noted at once."""
        asked, device = [prompts[number] for number in numbers], self.rows.device
        width, noise = max(map(len, asked)), noise.to(device)
        ids, padding, positions = (part.to(device) for part in pad_left(asked, width, self.pad_id))
        mask = (torch.arange(width, device=device) >= padding).long()
        read, logits = zip(*(decoder.read(ids, mask, positions) for decoder in self.decoders), strict=True)
        tokens, logprobs = choose(list(logits), self.weights, self.sampling, noise[:, 0])
        drawn = zip(tokens.tolist(), self.writing.is_end[tokens].tolist(), logprobs.cpu(), strict=True)
        kept, broken = [], 0
        for place, (token, end, logprob) in enumerate(drawn):
            broken += not logprob.isfinite()
            if end or self.sampling.max_new_tokens == 1:
                answers[numbers[place]] = Answer(list(asked[place]), [token], end, logprob.float()[None])
            else:
                kept.append(place)
        if broken:
            raise self.writing.not_finite(0, broken)
        if not kept:
            return None
        at = torch.tensor(kept, device=device)
        numbers = [numbers[place] for place in kept]
        return _Waiting(numbers, list(read), at, padding[at], width, noise[at], tokens[at], logprobs[at])

    def _fill_rows(self, waiting: _Waiting) -> _Waiting | None:
        """Let answers that wait take the rows that have none, as many as there are of both; returns the others."""
        rows = [place for place, row in enumerate(self.host) if row.number is None][: len(waiting.numbers)]
        taken, left = waiting.part(slice(len(rows))), waiting.part(slice(len(rows), None))
        device = self.rows.device
        at = torch.tensor(rows, device=device)
        for decoder, read in zip(self.decoders, taken.read, strict=True):
            decoder.refill(at, read, taken.places, taken.width)
        columns = torch.arange(self.room, device=device)
        seen = (columns >= taken.padding) & (columns < taken.width)  # (R, room)
        for dtype, mask in self.masks.items():
            mask[at, 0, 0] = torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)
        self.noise[at], self.fed[at] = taken.noise, taken.tokens[:, None]
        self.position[at] = taken.width - taken.padding
        self.column[at], self.place[at] = taken.width, 0
        self.writing.restart(at)
        self.writing.put(at, self.place[at], taken.tokens, taken.logprobs)
        for row, number in zip(rows, taken.numbers, strict=True):
            self.host[row] = _Row(number, taken.width, 1)
        return left if left.numbers else None

    def _run(self, columns: int) -> None:
        if columns != self.used:
            self.used = columns
            for layer in self.layers:
                layer.use(columns)
        if columns in self.again:
            self.again[columns]()
        else:
            self.again[columns] = self.capture(self.step)


def static_room(longest: int, max_new_tokens: int) -> int:
    """Columns of the caches for prompts of up to `longest` tokens: the last token is never fed."""
    return -(-(longest + max_new_tokens - 1) // BUCKET) * BUCKET
