"""The sequences of a batch put end to end in one row, so that a model computes nothing for padding.

No token sees one of another sequence: positions begin anew with each, by which transformers makes the mask of its
attention block-diagonal, or calls the kernels of the flash packages with the sequences' bounds. Which models are packed is
said once for each (`pack_batches`); what calls them gets hidden states where the padded batch would have them.
"""

import inspect
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minillm.models.batch import TokenBatch
from minillm.models.device import moved
from minillm.models.families import decoder, text_config

_packing: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class PackedBatch:
    """The T tokens of all sequences of a batch, without padding."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64, from 0 with every sequence
    places: Tensor  # (T,) int64, where each token stands in the flattened (B * L) positions of the batch
    shape: tuple[int, int]  # (B, L)
    bounds: tuple[int, ...]  # (B + 1): sequence b has the tokens from bounds[b] to bounds[b + 1]

    def unpack(self, states: Tensor) -> Tensor:  # (1, T, H) -> (B, L, H)
        """Hidden states where the padded batch has their tokens, and 0 at its padding."""
        rows, width = self.shape
        padded = states.new_zeros(rows * width, states.shape[-1])
        return padded.index_copy(0, self.places, states[0]).view(rows, width, -1)

    def pack(self, of_tokens: Tensor) -> Tensor:  # (B, L) -> (1, T)
        """The values of a padded batch at its tokens."""
        return of_tokens.flatten()[self.places][None]


def pack_batches(model: PreTrainedModel, packed: bool) -> None:
    """Say whether a model reads its batches packed. minillm.models.packing_check finds out which models can."""
    (_packing.add if packed else _packing.discard)(model)


def reads_packed(model: PreTrainedModel, batch: TokenBatch) -> bool:
    """True where a model reads this batch packed: it has padding, and shows no pictures, which stand beside its rows."""
    return model in _packing and not batch.extras and any(width < batch.input_ids.shape[1] for width in batch.widths)


def pack(batch: TokenBatch) -> PackedBatch:
    """The tokens of a batch, sequence after sequence."""
    device, width = batch.input_ids.device, batch.input_ids.shape[1]
    positions = torch.cat([torch.arange(one) for one in batch.widths])
    starts = [row * width for row in range(len(batch.widths))]
    places = torch.cat([torch.arange(start, start + one) for start, one in zip(starts, batch.widths, strict=True)])
    places = moved(places, device)
    return PackedBatch(
        input_ids=batch.input_ids.flatten()[places][None],
        position_ids=moved(positions, device)[None],
        places=places,
        shape=(len(batch.widths), width),
        bounds=(0, *accumulate(batch.widths)),
    )


def fed_mask(model: PreTrainedModel, batch: TokenBatch) -> Tensor:  # (B, L) or (1, T) int64
    """1 at the tokens and 0 at the padding that a model is fed for a batch, as its routers meet them."""
    if not reads_packed(model, batch):
        return batch.attention_mask
    return batch.attention_mask.new_ones(1, sum(batch.widths))


def attends_by_sequence(model: PreTrainedModel) -> bool:
    """True where the attention of a model takes the sequences of a packed batch one by one, and not all pairs of its tokens
    under a mask."""
    return attention_by_sequence(text_config(model.config)._attn_implementation)


def attention_by_sequence(implementation: str) -> bool:
    """`attends_by_sequence` for the name of an attention implementation."""
    return implementation.startswith("flash_attention") or implementation == "flex_attention"


def sequence_bounds(model: PreTrainedModel, packed: PackedBatch) -> dict[str, Tensor | int]:
    """The arguments by which the flash packages' kernels know the sequences: without them every layer would look for them
    in the positions, and wait for the device. Nothing for other kernels, and for code that takes no such arguments."""
    takes_any = inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(type(decoder(model)).forward).parameters.values()
    if not text_config(model.config)._attn_implementation.startswith("flash_attention"):
        return {}
    if not any(one.kind is takes_any for one in parameters):
        return {}
    bounds = moved(torch.tensor(packed.bounds, dtype=torch.int32), packed.input_ids.device)
    longest = max(end - start for start, end in zip(packed.bounds, packed.bounds[1:], strict=False))
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
