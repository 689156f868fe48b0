"""A buffer over several ranks: the teacher's hidden states stay with the rank that scored an answer, and are lent to the
rank that steps through it, for that step."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from minillm import distributed
from minillm.rollout.buffer import Rollout, RolloutBuffer


def lend(buffer: RolloutBuffer, parts: Sequence[Sequence[int]]) -> list[Rollout]:
    """This rank's rollouts of a step, with their hidden states. All ranks call it with the same parts.

    Args:
        buffer: as `score` gives it.
        parts: for each rank the indices of its rollouts; one part with one process.
    """
    if distributed.world_size() == 1:
        return [buffer[index] for index in parts[0]]
    me = distributed.rank()
    outgoing = [[buffer[index].teacher_hidden for index in part if distributed.home(index) == me] for part in parts]
    incoming = distributed.exchange([_bytes(rows) for rows in outgoing])
    own = buffer[me].teacher_hidden  # the first that it scored: of one dtype and width with all
    rollouts = {}
    for source, data in enumerate(incoming):
        indices = [index for index in parts[me] if distributed.home(index) == source]
        lengths = [len(buffer[index].response) for index in indices]
        rows = data.view(own.dtype).view(-1, own.shape[1]).split(lengths)
        for index, hidden in zip(indices, rows, strict=True):
            rollouts[index] = replace(buffer[index], teacher_hidden=hidden)
    return [rollouts[index] for index in parts[me]]


def _bytes(rows: list[Tensor]) -> Tensor:  # (T, H_t) each -> (bytes,) uint8
    return torch.cat(rows).reshape(-1).view(torch.uint8) if rows else torch.empty(0, dtype=torch.uint8)
