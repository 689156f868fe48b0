"""Token sequences side by side, and which position predicts what."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minillm import UserError

Pair = tuple[list[int], list[int]]  # (prompt ids, response ids with its EOS if it ended)


@dataclass(frozen=True)
class TokenBatch:
    """What a model's forward needs, and the N predictions that count.

    Predictions are named by their row, so that EOS used as padding can never hide a real EOS: a row counts because
    it stands in `rows`, not because of the id it holds. Rows run over the responses in order, token by token.
    """

    input_ids: Tensor  # (B, L) int64, right-padded; the last response token is predicted, never fed
    attention_mask: Tensor  # (B, L) int64, 1 on real tokens
    position_ids: Tensor  # (B, L) int64
    rows: Tensor  # (N,) int64 indices into the flattened (B * L) positions
    labels: Tensor  # (N,) int64, the id that each row predicts
    lengths: tuple[int, ...]  # response tokens of each sequence; sums to N

    def to(self, device: torch.device | str) -> "TokenBatch":
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "attention_mask", "position_ids", "rows", "labels")
        }
        return replace(self, **moved)

    def split(self, vector: Tensor) -> list[Tensor]:  # (N, ...) -> one (T, ...) a sequence
        """Per-sequence views of a per-row tensor."""
        return list(vector.split(self.lengths))


def collate(pairs: list[Pair], pad_id: int) -> TokenBatch:
    """Right-pad prompt + response and mark the positions that predict the response.

    Raises UserError for an empty prompt (nothing would predict the first response token).
    """
    if any(not prompt for prompt, _ in pairs):
        raise UserError("collate: a prompt has no tokens, so nothing predicts its first response token; add a BOS")
    fed = [prompt + response[:-1] for prompt, response in pairs]
    width = max((len(ids) for ids in fed), default=0)
    input_ids = torch.full((len(fed), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    rows, labels = [], []
    for row, (ids, (prompt, response)) in enumerate(zip(fed, pairs, strict=True)):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        first = row * width + len(prompt) - 1
        rows.extend(range(first, first + len(response)))
        labels.extend(response)
    return TokenBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=torch.arange(width).expand(len(fed), width),
        rows=torch.tensor(rows, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        lengths=tuple(len(response) for _, response in pairs),
    )
