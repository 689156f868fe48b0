"""What each of several ranks steps through. The teacher's hidden states of a buffer stay with the rank that scored an
answer, and are lent to the rank that trains on it, for that step."""

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
    """This rank's items of a step, rollouts with their hidden states. All ranks call it together.

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
    outgoing = [[buffer[index].teacher_hidden for index in part if collectives.owner(index) == me] for part in parts]
    incoming = collectives.exchange([_bytes(rows) for rows in outgoing])
    own = buffer[me].teacher_hidden  # the first that it scored: of one dtype and width with all
    rollouts = {}
    for source, data in enumerate(incoming):
        indices = [index for index in parts[me] if collectives.owner(index) == source]
        lengths = [len(buffer[index].response) for index in indices]
        rows = data.view(own.dtype).view(-1, own.shape[1]).split(lengths)
        for index, hidden in zip(indices, rows, strict=True):
            rollouts[index] = replace(buffer[index], teacher_hidden=hidden)
    return [rollouts[index] for index in parts[me]]


def _bytes(rows: list[Tensor]) -> Tensor:  # (T, H_t) each -> (bytes,) uint8
    return torch.cat(rows).reshape(-1).view(torch.uint8) if rows else torch.empty(0, dtype=torch.uint8)
