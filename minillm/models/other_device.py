"""Models on another device than the one where the losses are computed, which is the student's.

Such a model runs where it is, and its last hidden states are moved. Its head is needed where they arrive: the losses read
(V, H) weights chunk by chunk, and a copy of those gives the very numbers that one device would.
"""

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minillm.losses import LMHead
from minillm.models.access import plain_head, row_hidden, without_id
from minillm.models.batch import TokenBatch
from minillm.models.device import moved, same_device
from minillm.models.families import banned_id
from minillm.models.sharded import is_sharded

# model -> (its head's weight, its copies by device)
_copies: WeakKeyDictionary[nn.Module, tuple[Tensor, dict[torch.device, LMHead]]] = WeakKeyDictionary()


def elsewhere(model: PreTrainedModel, device: torch.device) -> torch.device | None:
    """The device of a model that is not on the given one, None for one that is. A sharded model is where its ranks are."""
    if is_sharded(model) or same_device(model.device, device):
        return None
    return model.device


def row_hidden_on(model: PreTrainedModel, batch: TokenBatch, device: torch.device) -> Tensor:  # (N, H)
    """The last hidden states at the rows of a batch, from where the model is to a device."""
    there = elsewhere(model, device)
    if there is None:
        return row_hidden(model, batch)
    return moved(row_hidden(model, batch.to(there)), device)


def head_on(model: PreTrainedModel, device: torch.device) -> LMHead:
    """The head of a model on a device, as minillm.models.access.lm_head has it: its own, or a copy without a gradient.

    Frozen weights are copied once and stay there until `forget_copies`; those that are trained are copied at every call.
    """
    head = plain_head(model)
    if elsewhere(model, device) is not None:
        head = _copied(model, head, device)
    return without_id(head, banned_id(model))


def forget_copies(model: nn.Module) -> None:
    """Give back the memory of the copies of a model's head."""
    _copies.pop(model, None)


def head_to(head: LMHead, device: torch.device) -> LMHead:
    """A head on a device, without a gradient."""
    bias = None if head.bias is None else moved(head.bias.detach(), device)
    return replace(head, weight=moved(head.weight.detach(), device), bias=bias)


def _copied(model: PreTrainedModel, head: LMHead, device: torch.device) -> LMHead:
    if any(one is not None and one.requires_grad for one in (head.weight, head.bias)):
        return head_to(head, device)
    of, known = _copies.get(model, (None, {}))
    if of is not head.weight:
        known = {}
        _copies[model] = head.weight, known
    if device not in known:
        known[device] = head_to(head, device)
    return known[device]
