"""A delta beside the model that it controls: in the decode loop with a cache of its own, and over whole answers.

Where both have one tokenizer the delta is fed the same ids. Where they have two it is fed the text that the model has read
and written so far, tokenised by its own tokenizer as its training data was. A token of the model can change the last tokens
of that text, so that the cached ones are kept as far as both agree, and those after them are masked and fed anew; a
row's ids are a function of its text, whatever it is decoded beside. (The released code appends the mapped id where the
spelling is the same, and begins the cache anew elsewhere: a model that writes letters would then have a delta of words
read letters that it has never seen.)
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from minillm import UserError
from minillm.data.tokenization import continuation_ids, encode
from minillm.models.access import NOTHING, forward_decoder, row_hidden
from minillm.models.batch import TokenBatch
from minillm.models.delta import Delta, DeltaPrompt
from minillm.models.families import cache_argument
from minillm.models.modes import sampling_mode
from minillm.rollout.local.decoder import Decoder, check_positions
from minillm.rollout.local.kv_cache import RoomyLayer, make_cache

CONTEXT = 8  # tokens of the prompt that an answer is decoded behind: a sentence's first space would be lost
UNFINISHED = "\ufffd"  # bytes of a character that is not complete yet


class TranslatedText:
    """The ids that a delta reads for one row, as the model's answer grows."""

    def __init__(self, delta: Delta, prompt: Sequence[int]):
        self.tokenizer, self.source = delta.tokenizer, delta.translation.tokenizer
        known = delta.translation.prompts.get(tuple(prompt))
        if known is None:
            text = self.source.decode(prompt, skip_special_tokens=True)
            known = DeltaPrompt(text, encode(self.tokenizer, text, True), True)
        self.prompt, self.context, self.response = known, list(prompt[-CONTEXT:]), []
        self.before = self._decode(self.context)
        self.ids = list(known.ids)

    def append(self, token: int) -> None:
        """Read one more token of the model."""
        self.response.append(token)
        text = self._decode(self.context + self.response)
        text = text[len(self.before) :] if text.startswith(self.before) else self._decode(self.response)
        text = text.rstrip(UNFINISHED)
        prompt = self.prompt
        self.ids = prompt.ids + continuation_ids(self.tokenizer, prompt.text, prompt.ids, text, prompt.special)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.source.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TranslatedStream:
    """A delta's last hidden states for rows of texts that grow and whose last ids may change, with its cache."""

    def __init__(self, delta: Delta, prompts: Sequence[Sequence[int]]):
        """Args: prompts: ids of the model."""
        self.delta = delta
        self.texts = [TranslatedText(delta, prompt) for prompt in prompts]
        self._begin()

    def hidden(self) -> Tensor:  # (B, H)
        """The state after the last id of every row; only ids that are new or changed are fed."""
        if not self.exact:
            self._begin()  # its cache forgets or mixes tokens, so that none can be taken back
        new = []
        for row, text in enumerate(self.texts):
            kept = _common(self.fed[row], text.ids[:-1])  # the last id is always fed, for its state
            self.mask[row, self.columns[row][kept:]] = 0
            self.fed[row], self.columns[row] = self.fed[row][:kept], self.columns[row][:kept]
            new.append(text.ids[kept:])
        check_positions(self.delta.model, max(len(text.ids) for text in self.texts))
        width, used = max(map(len, new)), self.mask.shape[1]
        ids = torch.zeros((len(new), width), dtype=torch.int64)
        positions, fresh = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, one in enumerate(new):  # padded at the left, so that the last column is the last id of all
            first, done = width - len(one), len(self.fed[row])
            ids[row, first:] = torch.tensor(one)
            positions[row, first:] = torch.arange(done, done + len(one))
            fresh[row, first:] = 1
            self.columns[row] = self.columns[row] + list(range(used + first, used + width))
            self.fed[row] = self.fed[row] + one
        self.mask = torch.cat([self.mask, fresh], 1)
        device = self.delta.model.device
        output = forward_decoder(
            self.delta.model,
            ids.to(device),
            self.mask.to(device),
            positions.to(device),
            **{cache_argument(self.delta.model): self.cache, "use_cache": True},
        )
        return output.last_hidden_state[:, -1]

    def keep(self, rows: Tensor) -> None:  # (rows to keep,) int64
        """Drop the other rows of the batch."""
        self.cache.reorder_cache(rows)
        kept = rows.tolist()
        self.mask = self.mask[kept]
        self.texts, self.fed, self.columns = (
            [part[row] for row in kept] for part in (self.texts, self.fed, self.columns)
        )

    def _begin(self) -> None:
        self.cache = DynamicCache(config=self.delta.model.config)
        self.exact = all(type(layer) is DynamicLayer for layer in self.cache.layers)
        rows = len(self.texts)
        self.fed: list[list[int]] = [[] for _ in range(rows)]  # ids of each row in the cache
        self.columns: list[list[int]] = [[] for _ in range(rows)]  # where they are in it
        self.mask = torch.zeros((rows, 0), dtype=torch.int64)


class TranslatedDecoder(Decoder):
    """A Decoder over a TranslatedStream: it takes the model's ids and gives the shift of the model's logits."""

    def __init__(self, delta: Delta, *, vocab_size: int):
        super().__init__(delta.model, DynamicCache(), vocab_size=vocab_size, head=delta.head())
        self.delta = delta
        self.stream: TranslatedStream | None = None

    def forward(
        self,
        input_ids: Tensor,  # (B, new tokens) int64, of the model
        attention_mask: Tensor,  # (B, tokens so far) int64
        position_ids: Tensor,  # (B, new tokens) int64, of the model: not read
        extras: Mapping[str, Tensor] = NOTHING,
        rows: Tensor | None = None,  # (R,) int64, those whose logits are wanted; None: all
    ) -> Tensor:  # (R, V padded) fp32
        if extras:
            raise UserError("the prompts show pictures, which a delta with another tokenizer cannot read")
        if self.stream is None:
            there = attention_mask.bool()
            self.stream = TranslatedStream(
                self.delta, [ids[mask].tolist() for ids, mask in zip(input_ids, there, strict=True)]
            )
        else:
            for text, token in zip(self.stream.texts, input_ids[:, 0].tolist(), strict=True):
                text.append(token)
        hidden = self.stream.hidden()
        return self.logits(hidden if rows is None else hidden[rows])

    def keep(self, rows: Tensor) -> None:  # (rows to keep,) int64
        self.stream.keep(rows)
        self._logits = None


class SummedDecoder:
    """A Decoder of the model with a delta's logits added to its own."""

    def __init__(self, decoder: Decoder, delta: Delta, *, room: int):
        """Args: room: tokens that the caches will hold for each row."""
        self.decoder, self.shift = decoder, _delta_decoder(delta, decoder.vocab_size, room)

    def forward(
        self,
        input_ids: Tensor,  # (B, new tokens) int64
        attention_mask: Tensor,  # (B, tokens so far) int64
        position_ids: Tensor,  # (B, new tokens) int64
        extras: Mapping[str, Tensor] = NOTHING,
        rows: Tensor | None = None,  # (R,) int64, those whose logits are wanted; None: all
    ) -> Tensor:  # (R, V padded) fp32
        """As Decoder.forward."""
        logits = self.decoder.forward(input_ids, attention_mask, position_ids, extras, rows)
        return logits.add_(self.shift.forward(input_ids, attention_mask, position_ids, extras, rows))

    def keep(self, rows: Tensor) -> None:  # (rows to keep,) int64
        """Drop the other rows of the batch."""
        self.decoder.keep(rows)
        self.shift.keep(rows)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of ids that both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(one), len(other)))


def _delta_decoder(delta: Delta, vocab_size: int, room: int) -> Decoder:
    if delta.translation is not None:
        return TranslatedDecoder(delta, vocab_size=vocab_size)
    cache = make_cache(delta.model, lambda: RoomyLayer(room))
    return Decoder(delta.model, cache, vocab_size=vocab_size, head=delta.head())


def delta_rows(delta: Delta, batch: TokenBatch) -> Tensor:  # (N, H_d)
    """The delta's last hidden states at the rows of a batch of the model, as the decode loop has them; no gradient."""
    with sampling_mode([delta.model]):
        if delta.translation is None:
            return row_hidden(delta.model, batch)
        if batch.extras:
            raise UserError("the prompts show pictures, which a delta with another tokenizer cannot read")
        return _translated_rows(delta, batch)


def _translated_rows(delta: Delta, batch: TokenBatch) -> Tensor:
    lengths = batch.lengths
    fed = [ids[mask.bool()].tolist() for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]
    prompts = [ids[: len(ids) - max(length - 1, 0)] for ids, length in zip(fed, lengths, strict=True)]
    there = torch.tensor([row for row, length in enumerate(lengths) if length], dtype=torch.int64)
    states: list[list[Tensor]] = [[] for _ in lengths]
    stream = TranslatedStream(delta, [prompts[row] for row in there.tolist()]) if len(there) else None
    for step in range(max(lengths, default=0)):
        going_on = torch.tensor([place for place, row in enumerate(there.tolist()) if lengths[row] > step])
        if len(going_on) < len(there):
            stream.keep(going_on)
            there = there[going_on]
        if step:
            for text, row in zip(stream.texts, there.tolist(), strict=True):
                text.append(fed[row][len(prompts[row]) + step - 1])
        for row, state in zip(there.tolist(), stream.hidden(), strict=True):
            states[row].append(state)
    found = [state for of_row in states for state in of_row]
    return torch.stack(found) if found else torch.zeros((0, delta.head().weight.shape[1]), device=batch.rows.device)
