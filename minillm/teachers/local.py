"""A teacher whose weights lie in this process, or in the processes of this run."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.losses import LMHead
from minillm.models.access import forward_layers, row_hidden, rows_of
from minillm.models.batch import TokenBatch
from minillm.models.device import moved
from minillm.models.modes import sampling_mode
from minillm.models.other_device import elsewhere, forget_copies, head_on
from minillm.models.sharded import fully_gathered, is_sharded, release
from minillm.teachers.teacher import ABILITIES, Ability, HiddenRows


class LocalTeacher:
    """See the module; the protocol is minillm.teachers.teacher.Teacher."""

    abilities: frozenset[Ability] = frozenset(ABILITIES)

    def __init__(self, model: PreTrainedModel, device: torch.device | None = None):
        """Args: device: where rows and the head are given, that of the losses; None: the model's own. The preflight of a pair
        says it."""
        self.model, self.device = model, device
        self._zero_engine = None  # what shards the weights over the ranks; it goes when they do

    @property
    def vocab_size(self) -> int:
        """Rows of its head."""
        return self.model.get_output_embeddings().weight.shape[0]

    def rows(self, batch: TokenBatch) -> HiddenRows:
        """One forward pass without a gradient."""
        with sampling_mode([self.model]):
            hidden = row_hidden(self.model, batch.read_by_teacher().to(self.model.device))
        return HiddenRows(self._given(hidden), self)

    def layers(self, batch: TokenBatch, layers: Collection[int]) -> dict[int, Tensor]:  # {layer: (N, H_t)}
        """Hidden states of some layers at the rows of a batch, numbered as minillm.models.access.forward_layers has them."""
        batch = batch.read_by_teacher().to(self.model.device)
        with sampling_mode([self.model]):
            _, states = forward_layers(self.model, batch, layers)
            return {layer: self._given(rows_of(state, batch)) for layer, state in states.items()}

    def rows_of(self, parts: Mapping[str, Tensor]) -> HiddenRows:  # {"hidden": (N, H_t)}
        return HiddenRows(parts["hidden"], self)

    @contextmanager
    def head(self) -> Iterator[LMHead]:
        with fully_gathered(self.model.get_output_embeddings()):
            yield head_on(self.model, self.device or self.model.device)

    def give_to(self, device: torch.device) -> None:
        """Give rows and the head on this device from now on."""
        self.device = device

    def sharded_by(self, engine) -> None:
        """Remember the DeepSpeed engine that shards the weights."""
        self._zero_engine = engine

    def close(self) -> None:
        forget_copies(self.model)
        if is_sharded(self.model) and self._zero_engine is not None:
            release(self._zero_engine, self.model)

    def _given(self, states: Tensor) -> Tensor:  # (N, H_t), on the model's device
        there = None if self.device is None else elsewhere(self.model, self.device)
        return states if there is None else moved(states, self.device)
