"""The forms in which a teacher's rows lie on disk, their sizes, and the error that each adds.

hidden    last hidden states in float32, bfloat16 or float16; or int8 with h ~ scale * q, scale = max |h| / 127 of a row
top_k     the k likeliest ids and their log-probabilities in nats; in 16 bits with the probability of all other ids in
          fp32, since what rounded log-probabilities leave of 1 is their rounding and no more
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from minillm.kernels.chunks import chunk_rows, logits_buffer
from minillm.kernels.head import project, ready
from minillm.losses import LMHead, linear_token_stats

Parts = dict[str, Tensor]  # (N, ...) each
LARGEST = 127  # of the whole numbers of int8
COMPARED = 32  # rows of a batch whose divergence from what is stored of them is measured: it takes two heads' products


@dataclass(frozen=True)
class RowStorage:
    """One form of storage; the keys of method cache that say it."""

    rows: str  # hidden, top_k
    dtype: str
    size: int  # the hidden size, or k

    @property
    def bytes_per_row(self) -> int:
        """Bytes that a token takes on disk."""
        if self.rows == "top_k":
            return self.size * (4 + getattr(torch, self.dtype).itemsize) + 4 * (self.dtype != "float32")
        return self.size + 4 if self.dtype == "int8" else self.size * getattr(torch, self.dtype).itemsize

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the stored tensors."""
        if self.rows == "top_k":
            return ("ids", "logprobs", "tail")[: 2 + (self.dtype != "float32")]
        return ("hidden", "scale")[: 1 + (self.dtype == "int8")]

    def encode(self, hidden: Tensor, head: LMHead) -> Parts:  # (N, H) -> on its device
        """Hidden states in this form."""
        if self.rows == "top_k":
            ids, logprobs = likeliest(hidden, head, self.size)
            parts = {"ids": ids.int(), "logprobs": logprobs.to(getattr(torch, self.dtype))}
            if "tail" in self.parts:
                parts["tail"] = (1 - logprobs.double().exp().sum(1)).clamp(0, 1).float()  # (N,)
            return parts
        if self.dtype != "int8":
            return {"hidden": hidden.to(getattr(torch, self.dtype))}
        scale = (hidden.float().abs().amax(1) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)  # (N,)
        return {"hidden": (hidden.float() / scale[:, None]).round().to(torch.int8), "scale": scale}

    def decode(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> Parts:
        """The parts that `rows_of` of a teacher takes: hidden states in the dtype of the head, or ids and log-probabilities."""
        if self.rows == "top_k":
            logprobs = parts["logprobs"].double()
            if "tail" in self.parts:  # the ids together are as likely again as they were
                logprobs += (torch.log1p(-parts["tail"].double()) - logprobs.logsumexp(1))[:, None]
            return {"ids": parts["ids"].long(), "logprobs": logprobs.float()}
        hidden = parts["hidden"]
        if self.dtype == "int8":
            hidden = hidden.float() * parts["scale"][:, None]
        return {"hidden": hidden.to(dtype)}


@torch.no_grad()
def likeliest(
    hidden: Tensor,  # (N, H)
    head: LMHead,
    k: int,
    own: Tensor | None = None,  # (N,) int64
) -> tuple[Tensor, Tensor]:  # (N, k) int64, (N, k)
    """The k likeliest ids of each row and their log-probabilities, fp32 (float64 for float64), a chunk of logits at a time.

    A row's `own` id, where the head has it, takes the place of the last of these unless it is one of them: so the
    log-probability of a text's own tokens is known of a teacher that says no more.

    Raises ValueError for more ids than the head has.
    """
    if k > len(head.weight):
        raise ValueError(f"k is {k}, and the head has {len(head.weight)} rows")
    compute, wide, device = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32), hidden.device
    size, weight = len(head.weight), ready(head.weight, compute, wide)
    step = chunk_rows(len(hidden), size, models=2, itemsize=wide.itemsize, device=device, chunk_bytes=None)
    ids, logprobs = [hidden.new_empty((0, k), dtype=torch.int64)], [hidden.new_empty((0, k), dtype=wide)]
    wanted = repeat(None) if own is None else own.to(device).split(step)
    for chunk, labels in zip(hidden.split(step), wanted) if len(hidden) else ():  # noqa: B905
        z = project(chunk, weight, head.bias, compute, logits_buffer(len(chunk), size, wide, device))
        z *= head.logit_scale
        if head.softcap is not None:
            banned = z == -torch.inf
            z = (z / head.softcap).tanh_().mul_(head.softcap).masked_fill_(banned, -torch.inf)
        values, indices = z.topk(k)
        if labels is not None:
            missed = (labels < size) & (indices != labels[:, None]).all(1)
            indices[missed, -1] = labels[missed]
            values[missed, -1] = z[missed, labels[missed]]
        ids.append(indices)
        logprobs.append(values - z.logsumexp(1, keepdim=True))
    return torch.cat(ids), torch.cat(logprobs)


class StorageError:
    """The sums from which the error of what was stored follows, over rows that are added batch by batch."""

    def __init__(self, sums: Mapping[str, float] | None = None):
        self.sums = dict(sums or {})

    def add(self, storage: RowStorage, hidden: Tensor, parts: Parts, head: LMHead) -> None:  # (N, H), (N, ...)
        """Compare a batch with what is stored of it."""
        if not len(hidden):
            return
        self._sum("rows", len(hidden))
        if storage.rows == "top_k":
            tail = (1 - storage.decode(parts, hidden.dtype)["logprobs"].double().exp().sum(1)).clamp_min(0)
            self._sum("tail", tail.sum().item())
            self._most("most_tail", tail.max().item())
            self._most("most_id", parts["ids"].max().item())
            return
        stored = storage.decode(parts, hidden.dtype)["hidden"]
        difference = stored.double() - hidden.double()
        self._sum("square", hidden.double().square().sum().item())
        self._sum("square_error", difference.square().sum().item())
        self._most("most_error", difference.abs().max().item())
        chosen = torch.linspace(0, len(hidden) - 1, min(COMPARED, len(hidden)), device=hidden.device).long()
        self._sum("compared", len(chosen))
        if not difference.any():
            return
        labels = torch.zeros(len(chosen), dtype=torch.int64, device=hidden.device)  # of no account
        divergence = linear_token_stats(
            stored[chosen], head, hidden[chosen], head, labels, fields=("forward_kl",)
        ).forward_kl.double()
        self._sum("divergence", divergence.sum().item())
        self._most("most_divergence", divergence.max().item())

    def merge(self, other: "StorageError") -> None:
        """Add the sums of other rows."""
        for name, value in other.sums.items():
            (self._most if name.startswith("most_") else self._sum)(name, value)

    def described(self) -> dict[str, Any]:
        """The error in numbers for cache.json, with the rows that each is over."""
        sums = self.sums
        rows = int(sums.get("rows", 0))
        if "tail" in sums:
            return {
                "rows": rows,
                "tail_probability_mean": sums["tail"] / rows,
                "tail_probability_most": sums["most_tail"],
                "largest_id": int(sums["most_id"]),
            }
        compared = int(sums.get("compared", 0))
        return {
            "rows": rows,
            "relative_rms": (sums.get("square_error", 0.0) / (sums.get("square", 0.0) or 1.0)) ** 0.5,
            "most": sums.get("most_error", 0.0),
            "compared_rows": compared,
            "forward_kl_nats_mean": sums.get("divergence", 0.0) / max(compared, 1),
            "forward_kl_nats_most": sums.get("most_divergence", 0.0),
        }

    def _sum(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def _most(self, name: str, value: float) -> None:
        self.sums[name] = max(self.sums.get(name, 0.0), value)
