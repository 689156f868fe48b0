"""The key-value cache of the decode loop: transformers' cache, its growing layers written into room made in advance."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from minillm import UserError
from minillm.models.families import text_model

# the functions of transformers that make the masks of layers that forget
_WINDOW_MASKS = {"create_sliding_window_causal_mask", "create_chunked_causal_mask"}


class RoomyLayer(DynamicLayer):
    """A full-attention layer that stores new keys and values in place, where DynamicLayer copies all the old ones.

    `keys` and `values` are views of the part in use, (B, heads, tokens, head size), so that whatever reads a
    DynamicLayer reads this one. `room` is the number of tokens that will come; more than that raises ValueError.
    """

    def __init__(self, room: int):
        super().__init__()
        self.room = room

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._stored = [_make_room(states, self.room) for states in (key_states, value_states)]
        self.use(0)

    def update(
        self,
        key_states: Tensor,  # (B, heads, new tokens, head size)
        value_states: Tensor,  # (B, heads, new tokens, head size)
        *args,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Append, and return all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.keys.shape[-2]
        after = before + key_states.shape[-2]
        if after > self.room:
            raise UserError(f"a key-value cache with room for {self.room} tokens was given token {after}")
        for stored, states in zip(self._stored, (key_states, value_states), strict=True):
            stored[:, :, before:after] = states
        self.use(after)
        return (self.keys, self.values) if before else (key_states, value_states)

    def reorder_cache(self, beam_idx: Tensor) -> None:  # (rows to keep,) int64
        """Keep these rows of the batch, in this order."""
        if not self.is_initialized:  # a model that swallows its cache
            return
        used = self.keys.shape[-2]
        for place, stored in enumerate(self._stored):
            kept = stored.new_empty((len(beam_idx), *stored.shape[1:]))
            torch.index_select(stored[:, :, :used], 0, beam_idx, out=kept[:, :, :used])
            self._stored[place] = kept
        self.use(used)

    def put(
        self,
        rows: Tensor,  # (R,) int64
        key_states: Tensor,  # (R, heads, tokens, head size)
        value_states: Tensor,  # (R, heads, tokens, head size)
    ) -> None:
        """Write over the last columns in use of these rows."""
        used, tokens = self.keys.shape[-2], key_states.shape[-2]
        for stored, states in zip(self._stored, (key_states, value_states), strict=True):
            stored[rows, :, used - tokens : used] = states

    def drop(self, tokens: int) -> None:
        """Forget the first `tokens` in use; the others move to the left."""
        if not self.is_initialized:  # a model that swallows its cache
            return
        left = self.keys.shape[-2] - tokens
        for stored in self._stored:
            stored[:, :, :left] = stored[:, :, tokens : tokens + left].clone()
        self.use(left)

    def use(self, tokens: int) -> None:
        """Let the first `tokens` be the part in use."""
        self.keys, self.values = (stored[:, :, :tokens] for stored in self._stored)


class StaticLayer(RoomyLayer):
    """A full-attention layer of fixed addresses: after the prompts, a row's next token goes where its `column` says.

    `column`, (B,) int64, lies on the device and is moved on by its owner, so that no number of the host decides where
    `update` writes. What follows the column in the part in use is 0 until it is written: masked, it must be finite.
    """

    def __init__(self, room: int, column: Tensor):
        super().__init__(room)
        self.column = column

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.clear()

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store the prompts as a RoomyLayer does; from then on write at the columns, and return the part in use."""
        if not self.is_initialized or not self.keys.shape[-2]:
            return super().update(key_states, value_states)
        for stored, states in zip(self._stored, (key_states, value_states), strict=True):
            stored.scatter_(2, self.column[:, None, None, None].expand_as(states), states)
        return self.keys, self.values

    def put(self, rows: Tensor, key_states: Tensor, value_states: Tensor) -> None:
        """Write over the first columns of these rows; they need not be in use."""
        for stored, states in zip(self._stored, (key_states, value_states), strict=True):
            stored[rows, :, : states.shape[-2]] = states

    def clear(self) -> None:
        """Ready for other prompts in the same memory."""
        for stored in self._stored:
            stored.zero_()
        self.use(0)


def make_cache(model: PreTrainedModel, make_layer: Callable[[], RoomyLayer]) -> Cache:
    """A cache with our layers. Sliding-window and recurrent ones, bounded anyway, stay transformers' own.

    transformers takes a layer for a sliding window by the configuration alone. Where the code of the model masks none
    (Moshi), a full pass sees the whole text, so the cache keeps all of it.
    """
    cache = DynamicCache(config=model.config)
    ours = {DynamicLayer} if _masks_windows(model) else {DynamicLayer, DynamicSlidingWindowLayer}
    cache.layers = [make_layer() if type(layer) in ours else layer for layer in cache.layers]
    return cache


def _masks_windows(model: PreTrainedModel) -> bool:
    """True where the code of a model can make the mask of a sliding window."""
    forward = inspect.unwrap(type(text_model(model)).forward)
    return not _WINDOW_MASKS.isdisjoint(forward.__globals__)


def _make_room(states: Tensor, room: int) -> Tensor:  # (B, heads, any, head size)
    batch, heads, _, size = states.shape
    return states.new_empty((batch, heads, room, size))
