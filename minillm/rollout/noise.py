"""The randomness of sampling: one uniform number a token, keyed by what is sampled and not by where or with whom."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64


def uniforms(seed: int, keys: Sequence[int], draw: int, length: int) -> Tensor:  # (B, length) float64 in [0, 1)
    """Row i holds the numbers of the sample `keys[i]`: position t is the same whatever the batch, rank or length.

    Philox is counter-based: (seed, key) is its key and `draw` stands in its counter, so streams never overlap.
    """
    rows = [
        np.random.Generator(
            np.random.Philox(
                key=np.array([seed % _WORD, key % _WORD], dtype=np.uint64),
                counter=np.array([0, 0, draw % _WORD, 0], dtype=np.uint64),
            )
        ).random(length)
        for key in keys
    ]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, length, dtype=torch.float64)
