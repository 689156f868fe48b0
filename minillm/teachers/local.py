"""A teacher whose weights lie in this process, or in the processes of this run."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from transformers import PreTrainedModel

from minillm.losses import LMHead
from minillm.models.access import forward_layers, lm_head, row_hidden, rows_of
from minillm.models.batch import TokenBatch
from minillm.models.modes import sampling_mode
from minillm.models.sharded import fully_gathered, is_sharded, release
from minillm.teachers.teacher import ABILITIES, Ability, HiddenRows


class LocalTeacher:
    """See the module; the protocol is minillm.teachers.teacher.Teacher."""

    abilities: frozenset[Ability] = frozenset(ABILITIES)

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._zero_engine = None  # what shards the weights over the ranks; it goes when they do

    @property
    def vocab_size(self) -> int:
        """Rows of its head."""
        return self.model.get_output_embeddings().weight.shape[0]

    def rows(self, batch: TokenBatch) -> HiddenRows:
        """One forward pass without a gradient."""
        with sampling_mode([self.model]):
            return HiddenRows(row_hidden(self.model, batch.read_by_teacher().to(self.model.device)), self)

    def layers(self, batch: TokenBatch, layers: Collection[int]) -> dict[int, Tensor]:  # {layer: (N, H_t)}
        """Hidden states of some layers at the rows of a batch, numbered as minillm.models.access.forward_layers has them."""
        batch = batch.read_by_teacher().to(self.model.device)
        with sampling_mode([self.model]):
            _, states = forward_layers(self.model, batch, layers)
            return {layer: rows_of(state, batch) for layer, state in states.items()}

    def rows_of(self, parts: Mapping[str, Tensor]) -> HiddenRows:  # {"hidden": (N, H_t)}
        return HiddenRows(parts["hidden"], self)

    @contextmanager
    def head(self) -> Iterator[LMHead]:
        with fully_gathered(self.model.get_output_embeddings()):
            yield lm_head(self.model)

    def sharded_by(self, engine) -> None:
        """Remember the DeepSpeed engine that shards the weights."""
        self._zero_engine = engine

    def close(self) -> None:
        if is_sharded(self.model) and self._zero_engine is not None:
            release(self._zero_engine, self.model)
