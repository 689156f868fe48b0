"""Counter-based noise: a number is a function of (seed, sample, draw, position), of no state, batch, rank or device.

Philox 4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) as numpy implements it: the
seed and the draw are its key, the sample and the position its counter.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

WORD = 1 << 64
TOKENS, COINS = 0, 1  # the highest of a counter's four words, which keeps the two kinds of noise apart
AGAIN = 1 << 32  # more than there are prompts


def uniforms(seed: int, keys: Sequence[int], draw: int, length: int) -> Tensor:
    """(B, length) float64 on the CPU, uniform in the open interval (0, 1); row b belongs to sample keys[b].

    Positions beyond `length` do not change those before it. seed, keys and draw are taken modulo 2**64.
    """
    raw = np.empty((len(keys), length), dtype=np.uint64)
    for row, key in enumerate(keys):
        raw[row] = _stream(seed, draw, key, TOKENS).random_raw(length)
    return _in_unit_interval(raw)


def coins(seed: int, draw: int, length: int) -> Tensor:
    """(length,) float64 on the CPU, uniform in (0, 1), of a whole draw: the same for all its samples.

    They have nothing to do with `uniforms` of any key. Positions beyond `length` do not change those before it.
    """
    return _in_unit_interval(_stream(seed, draw, 0, COINS).random_raw(length))


def distinct_keys(prompts: Sequence[int]) -> list[int]:
    """A key for each of the prompts that are answered together: its number, and another one each time it comes again."""
    before: Counter[int] = Counter()
    keys = []
    for number in prompts:
        keys.append(number + AGAIN * before[number])
        before[number] += 1
    return keys


def _stream(seed: int, draw: int, key: int, kind: int) -> np.random.Philox:
    # the lowest of the counter's four words counts positions; the others never reach a neighbour's
    return np.random.Philox(key=_words(seed, draw), counter=_words(0, 0, key, kind))


def _in_unit_interval(raw: np.ndarray) -> Tensor:
    # 52 bits and a half: exact in float64, and neither 0 nor 1
    return torch.from_numpy(((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52)


def _words(*numbers: int) -> np.ndarray:
    return np.array([number % WORD for number in numbers], dtype=np.uint64)
