"""New prompts in rows of a key-value cache whose answers have ended.

All rows of a cache end in the same column. A prompt that takes a row is read so that it ends there too: the columns before
it are masked like padding, and what models make of columns, such as masks of windows and chunks, stays right.
"""

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from minillm.rollout.local.kv_cache import RoomyLayer, make_cache

# of these it is known what belongs to a row
KNOWN_LAYERS = {
    RoomyLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    DummyLayer,
}


class RowsLayer(DynamicLayer):
    """Stores the keys and values of prompts in rows of a RoomyLayer, and keeps none of its own: they take no more memory."""

    def __init__(self, layer: RoomyLayer, rows: Tensor, copies: Tensor | None):  # (R,) int64 twice
        super().__init__()
        self.layer, self.rows, self.copies = layer, rows, copies

    def update(
        self,
        key_states: Tensor,  # (R or prompts, heads, tokens, head size)
        value_states: Tensor,  # (R or prompts, heads, tokens, head size)
        *args,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """Store, and return what was given."""
        kept = (key_states, value_states)
        if self.copies is not None:
            kept = (states[self.copies] for states in kept)
        self.layer.put(self.rows, *kept)
        return key_states, value_states


def cache_for_rows(
    model: PreTrainedModel,
    cache: Cache,  # of the running batch, of make_cache
    rows: Tensor,  # (R,) int64
    copies: Tensor | None = None,  # (R,) int64, the prompt of each row; None: a prompt for each
) -> Cache:
    """An empty cache in which a model reads prompts for R rows of another one; `put_rows` is to follow."""
    fresh = make_cache(model, lambda: RoomyLayer(0))
    fresh.layers = [
        RowsLayer(running, rows, copies) if isinstance(running, RoomyLayer) else new
        for running, new in zip(cache.layers, fresh.layers, strict=True)
    ]
    return fresh


def put_rows(cache: Cache, fresh: Cache, rows: Tensor, copies: Tensor | None = None) -> None:  # (R,) int64 twice
    """Move what is in the layers of `fresh`, as `cache_for_rows` gave it and a model filled it, into rows of `cache`."""
    if copies is not None:
        fresh.reorder_cache(copies)
    for running, new in zip(cache.layers, fresh.layers, strict=True):
        if isinstance(new, RowsLayer):
            continue
        if isinstance(new, DynamicLayer) and new.is_initialized:
            for old, states in ((running.keys, new.keys), (running.values, new.values)):
                old[rows, :, -states.shape[-2] :] = states
        if isinstance(new, LinearAttentionLayer):
            for old, states in (
                (running.conv_states, new.conv_states),
                (running.recurrent_states, new.recurrent_states),
            ):
                for name, state in states.items():
                    if state is not None:
                        old[name][rows] = state


def drop_columns(cache: Cache, columns: int) -> None:
    """Forget the first columns of all rows, of which no row needs any."""
    for layer in cache.layers:
        if isinstance(layer, RoomyLayer):
            layer.drop(columns)
        elif isinstance(layer, DynamicLayer) and layer.is_initialized:
            kept = layer.get_seq_length() - columns
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = kept
                kept = min(kept, layer.keys.shape[-2])
            layer.keys, layer.values = (states[:, :, -kept:] for states in (layer.keys, layer.values))


def rows_are_known(model: PreTrainedModel) -> bool:
    """True where every layer of a model's cache is one of which a row can be replaced."""
    return all(type(layer) in KNOWN_LAYERS for layer in make_cache(model, lambda: RoomyLayer(0)).layers)
