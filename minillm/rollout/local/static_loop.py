"""The decode loop of fixed shapes: a step reads and writes the same memory every time, so that a CUDA graph can hold it.

Where to write, which keys are seen, positions, tokens, log-probabilities and what has ended lie on the device and are
moved on by the step itself; no number of it comes from the host. Attention runs over the columns in use rounded up to
whole buckets, so that there is a step, and a graph, for each number of buckets.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from minillm import UserError
from minillm.rollout.local.decoder import Decoder, decoder_of
from minillm.rollout.local.graph_preconditions import require_static_shapes
from minillm.rollout.local.kv_cache import StaticLayer, make_cache
from minillm.rollout.local.token_drawing import Answer, PartialAnswers, Sampling, choose, pad_left
from minillm.teachers.pair import Models

BUCKET = 128  # columns of a cache
LOOK = 16  # steps from one look of the host at whether all rows have ended to the next

Capture = Callable[[Callable[[], None]], Callable[[], None]]  # runs a step, and returns what runs it again


class StaticLoop:
    """Decodes batches of up to `batch` prompts one after another, all in the memory of the first."""

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
        device = models.device
        self.column = torch.zeros(1, dtype=torch.int64, device=device)  # of the caches, where the next token goes
        self.place = torch.zeros(1, dtype=torch.int64, device=device)  # of the answers
        self.fed = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.position = torch.zeros_like(self.fed)
        self.noise = torch.zeros((batch, sampling.max_new_tokens), dtype=torch.float64, device=device)
        self.rows = torch.arange(batch, device=device)
        self.writing = PartialAnswers(models, roles, batch, sampling.max_new_tokens)
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
        noise: Tensor,  # (B, max_new_tokens) float64, CPU
        extras: Sequence[Mapping[str, Tensor]] = (),
    ) -> list[Answer]:
        """The answers of one batch. Raises UserError for logits that are not finite, and for prompts with pictures."""
        if any(extras):
            raise UserError(
                "rollout.cuda_graphs: prompts that show pictures have no step of static shapes; leave it out"
            )
        steps, looked, width = self.sampling.max_new_tokens, 0, max(map(len, prompts))
        self.begin(prompts, noise)
        for done in range(1, steps):
            if (done - 1) % LOOK == 0:
                if not self.writing.look(looked, done):
                    break
                looked = done
            self._run(-(-(width + done) // BUCKET) * BUCKET)
        else:
            self.writing.look(looked, steps)
        return self.writing.answers(prompts)

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
        self.position.copy_(positions[:, -1:])
        self.column.fill_(width - 1)
        self.place.zero_()
        self.writing.clear(len(prompts))
        for layer in self.layers:
            if layer.is_initialized:
                layer.clear()
        self.used = 0
        self._draw([decoder.forward(ids, seen[:, :width].long(), positions) for decoder in self.decoders])

    def step(self) -> None:
        """A token for every row, from and to the memory of this loop alone."""
        for mask in self.masks.values():
            mask.index_fill_(-1, self.column, 0.0)
        self._draw(
            [
                decoder.forward(self.fed, self.masks[decoder.model.dtype][..., : self.used], self.position)
                for decoder in self.decoders
            ]
        )

    def _draw(self, logits: list[Tensor]) -> None:  # (B, V padded) fp32 a model
        uniform = self.noise.index_select(1, self.place)[:, 0]
        token, logprob = choose(logits, self.weights, self.sampling, uniform)
        self.writing.put(self.rows, self.place, token, logprob)
        self.fed.copy_(token[:, None])
        for counter in (self.position, self.column, self.place):
            counter.add_(1)

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
