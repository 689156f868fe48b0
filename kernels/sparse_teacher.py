"""TopK, a teacher that is known by k of its ids: what it can say, its checks, and its k + 1 outcomes.

An outcome is one of the k ids, or "any other": the tail, with p_tail = 1 - sum p_i and q_tail = 1 - sum q_i. A
divergence over outcomes is at most the one over the vocabulary, and equal to it where k = V. The interpolated target is
the softmax of the outcomes' interpolated logits: with the tail of the teacher filled in the student's proportions,
q_j^(1-t) p_j^t adds up there to q_tail^(1-t) p_tail^t.

What the log-probabilities leave of 1 is a difference of rounded numbers. A tail that is smaller than their rounding is
taken to be as large as that (`_rounding`): of what lies below nothing is known, and a reverse KL to 0 would be infinite
wherever the student gives any other id the least probability. Only where the student has no other id (k = V, or the
others are banned) is such a tail no outcome at all.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

SAYABLE = (
    "student_logprob",
    "teacher_logprob",  # where the label is one of the k ids
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "student_argmax",
    "teacher_argmax",  # where one of the k is likelier than the whole tail
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "interpolated_cross_entropy",
)
DEFAULT = ("student_logprob", "reverse_kl", "forward_kl", "student_entropy", "student_argmax", "teacher_argmax")
OUTCOME_BUFFERS = 8  # numbers an outcome that are alive beside the logits of a row, in units of a logit


@dataclass(frozen=True)
class TopK:
    """A teacher that is known by k ids of each token and its log-probabilities of these; the rest of 1 is the tail.

    Passed as `teacher_hidden`, with `teacher_head=None`, to linear_divergence, linear_token_stats and linear_objective;
    the student's head may be a sum. Divergences are those of k + 1 outcomes, the ids and "any other": at most the ones
    over the vocabulary, and equal to them where k = V. The cross-entropy to the interpolated target is over the same
    outcomes, and its gradient is that of a teacher whose tail is shaped like the student's. The teacher's entropy cannot
    be said, and its log-probability of a label only where the label is one of the ids. backend="tiled" takes no TopK.

    The ids need not be the likeliest: the sampled one may stand beside them. Where ids of the teacher lie outside of the
    vocabulary that it shares with the student, leave them out: their probability is part of the tail. Rows of ignored
    tokens may hold anything.
    """

    ids: Tensor  # (..., k) int32 or int64 in [0, V), no id twice in a row
    logprobs: Tensor  # (..., k) nats, any floating-point dtype; -inf for an impossible id
    temperature: float = 1.0  # at which they were taken: they cannot be brought to another


class SparseRows(NamedTuple):
    """Rows of a TopK: of all tokens, or of a chunk."""

    ids: Tensor  # (N, k) int32 or int64; of a chunk int64
    logprobs: Tensor  # (N, k), dtype as given

    def of(self, rows: Tensor | slice) -> "SparseRows":  # C row indices
        """A chunk's rows."""
        return SparseRows(self.ids[rows].long(), self.logprobs[rows])


def check_top_k(
    top_k: TopK, teacher_head: Any, shape: torch.Size, device: torch.device, vocab_size: int, temperature: float
) -> None:
    """Check all that can be told without reading a number. Raises ValueError."""
    if teacher_head is not None:
        raise ValueError("teacher_head must be None where teacher_hidden is a TopK: there is nothing to project")
    ids, logprobs = top_k.ids, top_k.logprobs
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int32, torch.int64):
        got = getattr(ids, "dtype", type(ids).__name__)
        raise ValueError(f"teacher_hidden.ids must be an int32 or int64 tensor, got {got}")
    if not isinstance(logprobs, Tensor) or not logprobs.is_floating_point():
        got = getattr(logprobs, "dtype", type(logprobs).__name__)
        raise ValueError(f"teacher_hidden.logprobs must be a floating-point tensor, got {got}")
    if ids.dim() < 1 or ids.shape[:-1] != shape:
        raise ValueError(
            f"teacher_hidden.ids has shape {tuple(ids.shape)}, expected {(*shape, 'k')}: k ids for each hidden state "
            "of the student"
        )
    if logprobs.shape != ids.shape:
        raise ValueError(
            f"teacher_hidden.logprobs has shape {tuple(logprobs.shape)}, ids {tuple(ids.shape)}; pass one "
            "log-probability for each id"
        )
    for name, tensor in (("ids", ids), ("logprobs", logprobs)):
        if tensor.device != device:
            raise ValueError(f"teacher_hidden.{name} is on {tensor.device}, the student on {device}; move one of them")
    if not 1 <= ids.shape[-1] <= vocab_size:
        raise ValueError(
            f"teacher_hidden.ids has k={ids.shape[-1]} ids in a row, expected 1 to {vocab_size}, the vocabulary in use"
        )
    if top_k.temperature != temperature:
        raise ValueError(
            f"temperature={temperature}, but teacher_hidden is a TopK of temperature {top_k.temperature}: without the "
            "ids of its tail it cannot be brought to another; record the log-probabilities at the temperature of the "
            "loss and say so, TopK(ids, logprobs, temperature=...)"
        )


def check_sayable(fields: tuple[str, ...]) -> None:
    """Raises ValueError for statistics that a TopK cannot say."""
    refused = [name for name in fields if name not in SAYABLE]
    if refused:
        raise ValueError(
            f"fields: {', '.join(refused)} cannot be said of a teacher that is known by k ids; pass its hidden states "
            "and head, or leave the field out"
        )


class RowChecks:
    """Kept rows that break a rule, counted on the device, to be read together with the number of kept rows."""

    def __init__(
        self,
        rows: SparseRows,  # (N, k)
        vocab_size: int,
        labels: Tensor | None,  # (N,) int64, where they must be among the ids
    ):
        self.rows, self.vocab_size, self.labels = rows, vocab_size, labels

    def counts(self, kept: Tensor | None) -> list[Tensor]:  # (N,) bool, None for all rows
        """Numbers of kept rows, (), that break each rule."""
        ids, logprobs = self.rows
        ordered, most = ids.sort(1).values, _most(logprobs.dtype)
        broken = [
            ((ids < 0) | (ids >= self.vocab_size)).any(1),
            (ordered[:, 1:] == ordered[:, :-1]).any(1),
            (logprobs > most).any(1),
            logprobs.double().exp().sum(1) > 1 + most,
        ]
        if self.labels is not None:
            broken.append((ids != self.labels[:, None]).all(1))
        return [(rows if kept is None else rows & kept).sum() for rows in broken]

    def report(self, found: list[int], rows: int) -> None:
        """Raises ValueError for the first rule that any of the rows broke, given what `counts` counted."""
        messages = (
            f"ids lies outside [0, {self.vocab_size}), the vocabulary in use; leave such ids out: their probability is "
            "part of the tail",
            "ids names an id twice; name each once",
            "logprobs is positive; pass natural logarithms of probabilities, not probabilities or logits",
            "logprobs adds up to more than 1 in probability; pass natural logarithms of a softmax over the whole "
            "vocabulary",
            "ids does not name the label, whose teacher_logprob is then not known; record the label's log-probability "
            "among the k, or leave the field teacher_logprob out",
        )
        for number, message in zip(found, messages, strict=False):
            if number:
                raise ValueError(f"teacher_hidden: in {number} of {rows} kept rows {message}")


def teacher_outcomes(
    logprobs: Tensor,  # (C, k)
    empty: Tensor,  # (C,) bool: the student has no id in the tail
    dtype: torch.dtype,
) -> Tensor:
    """log p of the k ids and of the tail, (C, k + 1) of `dtype`, up to rounding normalised."""
    wide = logprobs.double()
    left = 1 - wide.exp().sum(1)
    tail = torch.maximum(left, _rounding(logprobs, dtype))
    tail = torch.where(empty, torch.where(left > _most(logprobs.dtype), left, 0.0), tail)
    return torch.cat((wide, tail.log()[:, None]), 1).to(dtype)


def teacher_logprob(rows: SparseRows, labels: Tensor, dtype: torch.dtype) -> Tensor:  # (C,) int64 -> (C,)
    """log p(label); NaN where the label is not among the ids and nothing is known of it."""
    at = rows.ids == labels[:, None]
    found = rows.logprobs.to(dtype).masked_fill(~at, 0.0).sum(1)
    return found.masked_fill(~at.any(1), torch.nan)


def teacher_argmax(rows: SparseRows, vocab_size: int) -> Tensor:
    """The likeliest id, (C,) int64, the lowest of equals; -1 where an id of the tail could be likelier."""
    top = rows.logprobs.amax(1, keepdim=True)
    best = torch.where(rows.logprobs == top, rows.ids, vocab_size).amin(1)
    if rows.ids.shape[1] == vocab_size:
        return best
    left = 1 - rows.logprobs.double().exp().sum(1)
    return torch.where(top[:, 0].double().exp() > left, best, -1)


def _rounding(logprobs: Tensor, dtype: torch.dtype) -> Tensor:  # (C, k) -> (C,) float64
    """The distance that the probabilities' sum may have from what it was before the logarithms were rounded to their dtype.

    Half a unit in the last place of each, and the last place of 1 in the precision of the softmax: float64 if everything
    is, else fp32.
    """
    p = logprobs.double().exp()
    softmax = torch.float64 if logprobs.dtype == dtype == torch.float64 else torch.float32
    entropy = torch.special.entr(p).sum(1)
    return entropy * (torch.finfo(logprobs.dtype).eps / 2) + torch.finfo(softmax).eps


def _most(dtype: torch.dtype) -> float:
    """The excess over 1 that the probabilities' sum may have, and over 0 a log-probability: who subtracts a log-sum-exp of
    300 in fp32 is off by 2e-5, and half precision by its last place times the entropy."""
    return 1e-4 + 8 * torch.finfo(dtype).eps
