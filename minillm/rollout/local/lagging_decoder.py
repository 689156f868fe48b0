"""A model that reads answers when it is asked for a token: what it has missed comes first, many tokens at a time."""

from collections.abc import Mapping

import torch
from torch import Tensor

from minillm.rollout.local.decoder import Decoder
from minillm.rollout.local.token_drawing import PartialAnswers

LONGEST_BLOCK = 32  # tokens a row: more take more memory, and little less time
ENDED_FRACTION = 0.25  # of the rows: when so many have nothing left to read, dropping them repays the copy of the cache


class LaggingDecoder:
    """The last hidden states of one model over the answers of a batch, of as many tokens as it was asked for.

    It has rows of its own: those of answers that ended stay until their last tokens are read.
    """

    def __init__(self, decoder: Decoder, writing: PartialAnswers, *, blocks: bool):
        """`blocks`: the model reads several tokens behind its cache as it reads one; otherwise it gets one at a time."""
        self.decoder, self.writing, self.longest = decoder, writing, LONGEST_BLOCK if blocks else 1
        self.read = 0  # tokens of every answer

    def read_prompts(
        self,
        ids: Tensor,  # (B, width) int64, padded at the left
        position: Tensor,  # (B, width) int64
        mask: Tensor,  # (B, room) int64, 0 on the padding
        extras: Mapping[str, Tensor],
    ) -> None:
        """Begin with the prompts."""
        batch, self.width = ids.shape
        last = self.decoder.hidden(ids, mask[:, : self.width], position, extras, prompts=True, last=True)[:, -1]
        self.rows = torch.arange(batch, device=ids.device)  # of the answers, still in the cache
        self.mask, self.next = mask, position[:, -1:] + 1  # the position of an answer's first token
        self.states = last.new_zeros(batch, len(self.writing.places), last.shape[-1])  # (B, max_new_tokens, H)
        self.states[:, 0] = last

    def catch_up(self, place: int) -> None:
        """Read what was written before `place`, so that `states` says what the model expects there."""
        while self.read < place:
            self._drop_rows()
            end = min(place, self.read + self.longest)
            ahead = torch.arange(self.read, end, device=self.rows.device)
            tokens = self.writing.tokens[self.rows, self.read : end]
            seen = self.mask[:, : self.width + end]
            self.states[self.rows, self.read + 1 : end + 1] = self.decoder.hidden(
                tokens, seen, self.next + ahead, prompts=False
            )
            self.read = end

    def logits(self, rows: Tensor, place: int) -> Tensor:  # (R,) int64, of the answers -> (R, V padded) fp32
        """The logits of these answers' tokens at a place that it has caught up with."""
        return self.decoder.logits(self.states[rows, place])

    def _drop_rows(self) -> None:
        """Let answers go of which every token is read, but for the last, which predicts nothing."""
        unread = self.writing.lengths[self.rows] > self.read + 1
        left = int(unread.sum())
        if left and len(self.rows) - left >= ENDED_FRACTION * len(self.rows):
            kept = unread.nonzero()[:, 0]
            self.decoder.keep(kept)
            self.rows, self.mask, self.next = self.rows[kept], self.mask[kept], self.next[kept]
