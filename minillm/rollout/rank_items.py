"""The items that each of several ranks steps through. The teacher's rows of a buffer stay with the rank that scored an
answer, and are sent to the rank that trains on it, for that step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from minillm.distributed import collectives
from minillm.rollout.buffer import Rollout, RolloutBuffer

Item = TypeVar("Item")


def rank_items(items: Sequence[Item] | RolloutBuffer, chosen: Sequence[int]) -> list[Item] | list[Rollout]:
    """This rank's items of a step, rollouts with the teacher's rows. All ranks call it together.

    Args:
        items: what was collected: the same on every rank, or a buffer as `score` gives it.
        chosen: the step's indices, the same on every rank, as many for each of them.
    """
    parts = np.array_split(np.asarray(chosen), collectives.world_size())
    mine = parts[collectives.rank()]
    if not isinstance(items, RolloutBuffer) or collectives.world_size() == 1:
        return [items[index] for index in mine]
    return _exchange_rows(items, parts)


def _exchange_rows(buffer: RolloutBuffer, parts: Sequence[np.ndarray]) -> list[Rollout]:
    me = collectives.rank()
    own = buffer[me].teacher  # of the first that it scored: of one dtype and width with all
    rollouts = {index: replace(buffer[index], teacher={}) for index in parts[me]}
    for name, like in own.items():
        outgoing = [[buffer[index].teacher[name] for index in part if collectives.owner(index) == me] for part in parts]
        incoming = collectives.exchange([_bytes(rows) for rows in outgoing])
        for source, data in enumerate(incoming):
            indices = [index for index in parts[me] if collectives.owner(index) == source]
            lengths = [len(buffer[index].response) for index in indices]
            rows = data.view(like.dtype).view(-1, *like.shape[1:]).split(lengths)
            for index, of_answer in zip(indices, rows, strict=True):
                rollouts[index].teacher[name] = of_answer
    return [rollouts[index] for index in parts[me]]


def _bytes(rows: list[Tensor]) -> Tensor:  # (T, ...) each -> (bytes,) uint8
    return torch.cat(rows).reshape(-1).view(torch.uint8) if rows else torch.empty(0, dtype=torch.uint8)
