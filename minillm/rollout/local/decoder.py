"""One model in the decode loop: its key-value cache, its forward pass, and the logits of the last position."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from minillm import UserError
from minillm.kernels.head import project, ready
from minillm.kernels.rows_torch import logits_from_raw
from minillm.losses import LMHead
from minillm.models.access import NOTHING, forward_decoder, forward_shown, lm_head
from minillm.models.device import moved
from minillm.models.families import cache_argument, cache_mask, text_config
from minillm.models.other_device import elsewhere
from minillm.rollout.local.cache_rows import drop_columns, put_rows
from minillm.rollout.local.distribution import padded_size
from minillm.rollout.local.kv_cache import RoomyLayer, make_cache
from minillm.teachers.pair import Models, Role


@dataclass(frozen=True)
class ReadPrompts:
    """Prompts that a model has read, and no row of a batch has taken yet."""

    cache: Cache
    shift: Tensor | None  # (P, 1) int64, added to the positions of what follows


class Decoder:
    """Answers `forward` with the prompts, then with a token a row at a time, by next-token logits, (B, V padded) fp32.

    The vocabulary is cut to the first `vocab_size` ids; columns beyond it are -inf. The logits' memory is written anew
    by the next call.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: Cache,
        *,
        vocab_size: int,
        head: LMHead | None = None,
        device: torch.device | None = None,
    ):
        """Args:
        head: in the place of the model's own.
        device: where tokens come from, and hidden states and logits go, `head` included; None: where the model is.
        """
        self.model, self.cache, self.vocab_size = model, cache, vocab_size
        self.here, self.there = device, None if device is None else elsewhere(model, device)
        head = lm_head(model) if head is None else head
        self.weight, self.bias = head.weight[:vocab_size], None if head.bias is None else head.bias[:vocab_size]
        self.logit_scale, self.softcap = head.logit_scale, head.softcap
        self._shift: Tensor | None = None  # (B, 1) int64, added to positions after the prompts
        self._logits: Tensor | None = None
        self._batch = 0  # rows

    def forward(
        self,
        input_ids: Tensor,  # (B, new tokens) int64
        # (B, tokens so far) int64, 0 on the padding at the left; or (B, 1, new tokens, keys), added to the scores
        attention_mask: Tensor,
        position_ids: Tensor,  # (B, new tokens) int64
        extras: Mapping[str, Tensor] = NOTHING,  # what prompts show, with the prompts alone
        rows: Tensor | None = None,  # (R,) int64, those whose logits are wanted; None: all
    ) -> Tensor:
        """Feed tokens and return the logits of what follows the last of them."""
        prompts = bool(extras) or input_ids.shape[1] > 1
        hidden = self.hidden(input_ids, attention_mask, position_ids, extras, prompts=prompts, last=True)[:, -1]
        return self.logits(hidden if rows is None else hidden[rows])

    def read(
        self,
        input_ids: Tensor,  # (P, L) int64, padded at the left
        attention_mask: Tensor,  # (P, L) int64, 0 on the padding
        position_ids: Tensor,  # (P, L) int64
        extras: Mapping[str, Tensor] = NOTHING,
    ) -> tuple["ReadPrompts", Tensor]:  # (P, V padded)
        """Read prompts beside the running batch, and return the logits of what follows them."""
        running = self.cache, self._shift, self._batch
        self.cache = make_cache(self.model, lambda: RoomyLayer(input_ids.shape[1]))
        hidden = self.hidden(input_ids, attention_mask, position_ids, extras, prompts=True, last=True)[:, -1]
        logits = self.logits(hidden)
        read = ReadPrompts(self.cache, self._shift)
        self.cache, self._shift, self._batch = running
        return read, logits

    def refill(
        self,
        rows: Tensor,  # (R,) int64, of the batch
        read: "ReadPrompts",
        places: Tensor,  # (R,) int64, of the prompts in `read`
        columns: int,  # of the longest of them; with the padding before it where rows are of fixed shapes
    ) -> None:
        """Let prompts that were read take rows of the batch, over what these held.

        They end in the last column of the cache, which must be as long as they are.
        """
        at, of = self._taken(rows), self._taken(places)
        put_rows(self.cache, at, read.cache, of, columns)
        if self._shift is None and read.shift is not None:
            self._shift = read.shift.new_zeros(self._batch, 1)
        if self._shift is not None:
            self._shift[at] = 0 if read.shift is None else read.shift[of]

    def drop_columns(self, columns: int) -> None:
        """Forget the first columns of the cache, of which no row needs any."""
        drop_columns(self.cache, columns)

    def hidden(
        self,
        input_ids: Tensor,  # (B, new tokens) int64
        attention_mask: Tensor,  # as `forward` takes it
        position_ids: Tensor,  # (B, new tokens) int64
        extras: Mapping[str, Tensor] = NOTHING,  # with the prompts alone
        *,
        prompts: bool,  # they are the prompts; otherwise tokens of answers, any number of them at a time
        last: bool = False,  # the states at the last of them alone
    ) -> Tensor:  # (B, new tokens or 1, H)
        """Feed tokens and return the last hidden states at all of them."""
        if self.there is not None:
            input_ids, attention_mask, position_ids = map(self._taken, (input_ids, attention_mask, position_ids))
            extras = {name: self._taken(one) for name, one in extras.items()}
        cached = {cache_argument(self.model): self.cache, "use_cache": True}
        self._batch = len(input_ids)
        if prompts:
            prompt = attention_mask.bool()
            output, self._shift = forward_shown(
                self.model, input_ids, attention_mask, position_ids, extras, prompt=prompt, **cached
            )
        else:
            positions = position_ids if self._shift is None else position_ids + self._shift
            mask = cache_mask(self.model, attention_mask, input_ids.shape[1])
            output = forward_decoder(self.model, input_ids, mask, positions, **cached)
        states = output.last_hidden_state
        return self._given(states[:, -1:] if last else states)

    def keep(self, rows: Tensor) -> None:  # (rows to keep,) int64
        """Drop the other rows of the batch. A row that is named several times is copied."""
        rows = self._taken(rows)
        self.cache.reorder_cache(rows)
        self._shift = None if self._shift is None else self._shift[rows]
        self._logits, self._batch = None, len(rows)

    def _taken(self, tensor: Tensor) -> Tensor:
        """A tensor where the model is."""
        return tensor if self.there is None else moved(tensor, self.there)

    def _given(self, hidden: Tensor) -> Tensor:
        """Hidden states, where the model is asked."""
        return hidden if self.there is None else moved(hidden, self.here)

    def logits(self, hidden: Tensor) -> Tensor:  # (B, H) -> (B, V padded) fp32
        """Logits of the token that follows each of these last hidden states."""
        if self._logits is None or len(self._logits) < len(hidden):
            shape = (hidden.shape[0], padded_size(self.vocab_size))
            self._logits = torch.empty(shape, device=hidden.device)
        logits = self._logits[: len(hidden)]
        used = logits[:, : self.vocab_size]
        logits[:, self.vocab_size :] = -torch.inf  # again in every step: sampling works in this memory
        project(hidden, ready(self.weight, hidden.dtype, used.dtype), self.bias, hidden.dtype, used)
        if self.logit_scale != 1.0 or self.softcap is not None:
            used.copy_(logits_from_raw(used, self.logit_scale, self.softcap, 1.0))
        return logits


def decoder_of(models: Models, role: Role, cache: Cache) -> Decoder:
    """The decoder of a role, whose hidden states and logits are on models.device."""
    head, device = models.head(role), models.device
    return Decoder(models.model(role), cache, vocab_size=models.vocab_size, head=head, device=device)


def check_positions(model: PreTrainedModel, longest: int) -> None:
    """Raises UserError where a table of learned positions ends before the longest sequence does."""
    config = text_config(model.config)
    limit = getattr(config, "max_position_embeddings", None)
    rotates = getattr(config, "rope_parameters", None) is not None
    if limit is not None and not rotates and longest > limit:
        raise UserError(
            f"{type(model).__name__} has {limit} positions, but the longest prompt with max_new_tokens needs {longest}; "
            "shorten max_prompt_length or max_new_tokens"
        )
