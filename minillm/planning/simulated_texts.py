"""The texts that are fed to simulated models: ids, masks and pictures of the shapes that a run has."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from minillm.models.batch import TokenBatch
from minillm.planning.picture_passes import ids_with_pictures
from minillm.planning.setting import Setting
from minillm.planning.work import Forward, TermShape


class SimulatedTexts:
    """See the module.

    Args:
        setting: whether prompts show pictures, and batches are packed.
        models: those that read the texts, by name: a picture's placeholder is theirs.
    """

    def __init__(self, setting: Setting, models: Mapping[str, PreTrainedModel]):
        self.setting, self.models = setting, models

    def shows(self, length: int) -> bool:
        """True for prompts with pictures and room for them: where a set's prompts are shorter its pictures are smaller."""
        return self.setting.shown is not None and self.setting.shown.fit(length)

    def ids(self, name: str, batch: int, length: int, *, shows: bool) -> Tensor:  # (B, L) int64
        """The ids of texts that a model reads, with its placeholders where they show pictures."""
        shown = self.setting.shown
        if shown is None:
            return torch.zeros(batch, length, dtype=torch.int64)
        return ids_with_pictures(self.models[name], batch, length, shown.count * shows, shown.tokens)

    def shown(self, prompts: int) -> dict[str, Tensor]:
        """The pictures of so many prompts, as the forward pass takes them."""
        return self.setting.shown.inputs.repeated(prompts)

    def batch(self, name: str, one: Forward | TermShape, length: int) -> TokenBatch:
        """The texts of a pass that a model takes."""
        shows = one.prompted and self.shows(length)
        return TokenBatch(
            input_ids=self.ids(name, one.batch, length, shows=shows),
            attention_mask=mask(one.batch, length),
            position_ids=torch.arange(length).expand(one.batch, length),
            rows=torch.zeros(one.rows, dtype=torch.int64),
            labels=torch.zeros(one.rows, dtype=torch.int64),
            lengths=(one.rows // one.batch,) * one.batch,
            # what is packed has some padding: a token of it at the least, and in the worst batch no more
            widths=(length,) * (one.batch - 1) + (max(1, length - (self.setting.packed and one.batch > 1)),),
            extras=self.shown(one.batch) if shows else {},
        )


def mask(batch: int, length: int) -> Tensor:  # (B, L) int64
    """Where tokens are. Of several texts one is shorter: batches without padding need no mask of pairs."""
    where = torch.ones(batch, length, dtype=torch.int64)
    if batch > 1 and length > 1:
        where[-1, -1] = 0
    return where
