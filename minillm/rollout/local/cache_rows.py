"""Prompts that were read in a cache of their own, in rows of another one whose answers have ended.

All rows of a cache end in the same column. A prompt that takes a row ends there too: the columns before it are masked
like padding, and what models make of columns, such as masks of windows and chunks, stays right.
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


def put_rows(
    cache: Cache,
    rows: Tensor,  # (R,) int64, of it
    read: Cache,  # of the same model
    places: Tensor,  # (R,) int64, rows of `read`
    columns: int,  # the last ones of `read`, in which these prompts are; no more than those of `cache`
) -> None:
    """Copy rows of a cache in which prompts were read into rows of a running one."""
    for running, new in zip(cache.layers, read.layers, strict=True):
        if isinstance(running, RoomyLayer):
            if running.is_initialized:  # else the model swallows its cache
                running.put(rows, *(states[places, :, -columns:] for states in (new.keys, new.values)))
        elif isinstance(new, DynamicLayer) and new.is_initialized:
            for old, states in ((running.keys, new.keys), (running.values, new.values)):
                taken = states[places, :, -columns:]  # all of a layer that keeps fewer
                old[rows, :, -taken.shape[-2] :] = taken
        if isinstance(new, LinearAttentionLayer):
            for old, states in (
                (running.conv_states, new.conv_states),
                (running.recurrent_states, new.recurrent_states),
            ):
                for name, state in states.items():
                    if state is not None:
                        old[name][rows] = state[places]


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
