"""The row operations where the teacher is a TopK: the vocabulary's logits to k + 1 outcomes, and their gradient back.

With T the ids of the tail, t_j = softmax of z over T alone, and

    z_tail = log sum_{j in T} exp z_j,      o = (z_1, .., z_k, z_tail)

softmax(o) are the student's probabilities of the outcomes, so that a divergence over outcomes is one over k + 1 logits,
which the row operations of a dense teacher compute; and its gradient is

    dz_i = do_i for the k ids,      dz_j = do_tail t_j in the tail.

z_tail comes from the sum over the tail itself: however small q_tail is, it keeps its digits, as 1 - sum q_i would not.
The entropy is H(o) + q_tail H(t).

The logits of the k ids are taken out first, -inf in their places: then the tail is all that is left of a row, and is
read and overwritten in whole rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from minillm.kernels.divergences import FIELDS, RowSpec
from minillm.kernels.rows_torch import logits_from_raw, softcap_slope
from minillm.kernels.sparse_teacher import SparseRows, teacher_argmax, teacher_logprob, teacher_outcomes

Statistics = dict[str, Tensor]


class Tail(Protocol):
    """The functions of a backend over whole rows, of which the k ids are banned; a module has them."""

    def tail_statistics(self, student: Tensor, spec: RowSpec, *, entropy: bool, argmax: bool) -> Statistics:
        """tail_max and tail_log_sum, which add up to the log-sum-exp of z, both -inf where there is no id; tail_entropy
        (0 there) and tail_argmax where asked for. (C,) each. `student` (C, V) raw logits, left as they are."""

    def tail_gradients(
        self,
        student: Tensor,  # (C, V) raw logits; their memory is overwritten
        statistics: Statistics,  # (C,) each
        whole: Tensor,  # (C,): d loss / d z_tail
        entropy: Tensor | None,  # (C,): d loss / d tail_entropy
        spec: RowSpec,
        grad_dtype: torch.dtype,
    ) -> Tensor:
        """d loss / d raw logits, (C, V) of `grad_dtype`; 0 where there is no id."""


@dataclass
class _Rows:
    """Rows whose k ids are taken out."""

    student: Tensor  # (C, V) raw logits, -inf at the ids
    teacher: SparseRows
    raw: Tensor  # (C, k) raw logits of the ids
    labels: Tensor | None  # (C,)
    raw_label: Tensor | None  # (C, 1)

    @classmethod
    def of(cls, student: Tensor, teacher: SparseRows, labels: Tensor | None) -> "_Rows":
        raw = student.gather(1, teacher.ids)
        raw_label = None if labels is None else student.gather(1, labels[:, None])
        return cls(student.scatter_(1, teacher.ids, -torch.inf), teacher, raw, labels, raw_label)


class OutcomeRows:
    """`rows_torch` or `rows_triton` for a TopK: the same operations, with a chunk's SparseRows as the teacher."""

    def __init__(self, dense: ModuleType, tail: Tail):
        self.dense, self.tail = dense, tail

    def row_statistics(
        self,
        student: Tensor,  # (C, V) raw logits h W^T + b
        teacher: SparseRows,
        labels: Tensor | None,  # (C,) int64 in [0, V), where a field needs them
        spec: RowSpec,
    ) -> Statistics:
        """The statistics `spec.fields`, each (C,) in the dtype of the logits (argmaxes int64), and what row_gradients reads.
        The logits stay as they are.
        """
        rows = _Rows.of(student, teacher, labels)
        statistics = self._statistics(rows, spec)
        student.scatter_(1, teacher.ids, rows.raw)
        return statistics

    def row_gradients(
        self,
        student: Tensor,  # (C, V) raw logits
        teacher: SparseRows,
        labels: Tensor | None,  # (C,) int64, where a coefficient needs them
        statistics: Statistics,  # (C,) each: what row_statistics returned for these rows
        coefficients: dict[str, Tensor],  # (C,) each: d loss / d field; absent means zero
        spec: RowSpec,
        grad_dtype: torch.dtype,
    ) -> Tensor:
        """d loss / d raw student logits, (C, V) of `grad_dtype`."""
        return self._gradients(_Rows.of(student, teacher, labels), statistics, coefficients, spec, grad_dtype)

    def row_loss_gradients(
        self,
        student: Tensor,  # (C, V) raw logits
        teacher: SparseRows,
        labels: Tensor | None,  # (C,) int64, where a field needs them
        spec: RowSpec,
        differentiate: Callable[[slice, Statistics], dict[str, Tensor]],
        grad_dtype: torch.dtype,
    ) -> Tensor | None:
        """row_statistics, then row_gradients with the coefficients that differentiate(rows, statistics) returns for all
        rows of the chunk. None where it returns none."""
        rows = _Rows.of(student, teacher, labels)
        statistics = self._statistics(rows, spec)
        coefficients = differentiate(slice(None), {name: statistics[name] for name in spec.fields})
        if not coefficients:
            return None
        return self._gradients(rows, statistics, coefficients, spec, grad_dtype)

    def row_known_gradients(
        self,
        student: Tensor,  # (C, V) raw logits
        teacher: SparseRows,
        labels: Tensor | None,
        spec: RowSpec,
        coefficients: dict[str, float],  # d loss / d field, the same in every row
        grad_dtype: torch.dtype,
    ) -> tuple[Statistics, Tensor]:
        """row_statistics, and row_gradients of a loss that is linear in them."""
        rows = _Rows.of(student, teacher, labels)
        statistics = self._statistics(rows, spec)
        everywhere = {name: torch.full_like(statistics[name], value) for name, value in coefficients.items()}
        return statistics, self._gradients(rows, statistics, everywhere, spec, grad_dtype)

    def _statistics(self, rows: _Rows, spec: RowSpec) -> Statistics:
        fields = set(spec.fields)
        result = self.tail.tail_statistics(
            rows.student, spec, entropy="student_entropy" in fields, argmax="student_argmax" in fields
        )
        z, reference = _student_outcomes(rows, result, spec)
        found = self.dense.row_statistics(z, _teacher_outcomes(rows, result), None, _outcome_spec(spec))
        largest, log_sum = found["student_max"], found["student_log_sum"]
        if "student_logprob" in fields:
            label = logits_from_raw(rows.raw_label, *_scaling(spec))
            found["student_logprob"] = (label - reference)[:, 0] - largest - log_sum
        if "student_entropy" in fields:
            found["outcome_entropy"] = found["student_entropy"]
            tail = torch.exp((z[:, -1] - largest) - log_sum)
            found["student_entropy"] = found["outcome_entropy"] + tail * result["tail_entropy"]
        if "student_argmax" in fields:
            found["student_argmax"] = _argmax(rows, result["tail_max"], result.pop("tail_argmax"), spec)
        if "teacher_logprob" in fields:
            found["teacher_logprob"] = teacher_logprob(rows.teacher, rows.labels, z.dtype)
        if "teacher_argmax" in fields:
            found["teacher_argmax"] = teacher_argmax(rows.teacher, rows.student.shape[1])
        return result | found

    def _gradients(
        self,
        rows: _Rows,
        statistics: Statistics,
        coefficients: dict[str, Tensor],
        spec: RowSpec,
        grad_dtype: torch.dtype,
    ) -> Tensor:
        z, _ = _student_outcomes(rows, statistics, spec)
        q = torch.exp((z - statistics["student_max"][:, None]) - statistics["student_log_sum"][:, None])
        dz = self._outcome_gradients(z, rows, statistics, coefficients, spec)
        logprob, entropy = coefficients.get("student_logprob"), coefficients.get("student_entropy")
        if logprob is not None:
            dz = dz - logprob[:, None] * q
        if entropy is not None:
            entropy = entropy * q[:, -1]
            through = (entropy * statistics["tail_entropy"])[:, None]
            ids = -through * q[:, :-1]
            dz = dz + torch.cat((ids, -ids.sum(1, keepdim=True)), 1)
        tail = dz[:, -1]
        label = None
        if logprob is not None:  # before the logits' memory is overwritten
            t, log_t = _label_in_tail(rows, statistics, spec)
            label = tail * t + logprob
            if entropy is not None:
                label = label - entropy * t * (log_t + statistics["tail_entropy"])
            label = label[:, None] * _slope(rows.raw_label, spec)
            dz[:, :-1] += torch.where(rows.teacher.ids == rows.labels[:, None], logprob[:, None], 0.0)
        ids = dz[:, :-1] * _slope(rows.raw, spec)
        gradient = self.tail.tail_gradients(rows.student, statistics, tail, entropy, spec, grad_dtype)
        # both as sums in full precision: in half precision 1 - q(label) must not be a difference
        if label is not None:
            gradient.scatter_(1, rows.labels[:, None], label.to(grad_dtype))
        return gradient.scatter_(1, rows.teacher.ids, ids.to(grad_dtype))  # over the label, where it is one of them

    def _outcome_gradients(
        self, z: Tensor, rows: _Rows, statistics: Statistics, coefficients: dict[str, Tensor], spec: RowSpec
    ) -> Tensor:
        """d loss / d z but for the label's part and that of the tail's entropy, (C, k + 1); takes the memory of z."""
        coefficients = {name: value for name, value in coefficients.items() if name != "student_logprob"}
        if not coefficients:
            return torch.zeros_like(z)
        large = (z[:, -1] - statistics["student_max"]) - statistics["student_log_sum"] > math.log(0.5)
        if "student_entropy" in coefficients:
            statistics = statistics | {"student_entropy": statistics["outcome_entropy"]}
        theirs = _teacher_outcomes(rows, statistics)
        dz = self.dense.row_gradients(z, theirs, None, statistics, coefficients, _outcome_spec(spec), z.dtype)
        # a row adds up to 0: of a tail that is nearly all of it, u - E_q[u] is a difference without digits
        dz[:, -1] = torch.where(large, -dz[:, :-1].sum(1), dz[:, -1])
        return dz


def _outcome_spec(spec: RowSpec) -> RowSpec:
    """Outcomes come as logits: nothing is to be done to them."""
    chosen = [name for name in spec.fields if FIELDS[name].value is not None]
    return RowSpec(tuple(chosen), beta=spec.beta, alpha=spec.alpha, interpolation=spec.interpolation)


def _scaling(spec: RowSpec) -> tuple[float, float | None, float]:
    return spec.student_scale, spec.student_softcap, spec.temperature


def _student_outcomes(rows: _Rows, tail: Statistics, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """The logits of the outcomes over their reference, (C, k + 1), and it, (C, 1): a row's largest logit.

    Differences first: added up, a large maximum and a small log-sum would cost the sum its last digits.
    """
    z = logits_from_raw(rows.raw, *_scaling(spec))
    reference = torch.maximum(z.amax(1), tail["tail_max"])[:, None]
    below = tail["tail_max"][:, None] - reference
    return torch.cat((z - reference, below + tail["tail_log_sum"][:, None]), 1), reference


def _teacher_outcomes(rows: _Rows, tail: Statistics) -> Tensor:
    empty = tail["tail_log_sum"] == -torch.inf
    return teacher_outcomes(rows.teacher.logprobs, empty, rows.raw.dtype)


def _argmax(rows: _Rows, tail_max: Tensor, tail_argmax: Tensor, spec: RowSpec) -> Tensor:
    """The lowest id with the largest logit, of the k and of the tail, (C,) int64."""
    z = logits_from_raw(rows.raw, *_scaling(spec))
    top = z.amax(1)
    best = torch.where(z == top[:, None], rows.teacher.ids, rows.student.shape[1]).amin(1)
    best = torch.where(top == tail_max, torch.minimum(best, tail_argmax), best)
    return torch.where(top < tail_max, tail_argmax, best)


def _label_in_tail(rows: _Rows, statistics: Statistics, spec: RowSpec) -> tuple[Tensor, Tensor]:
    """t at the label and its logarithm, (C,) each; the latter 0 where the former is."""
    z = logits_from_raw(rows.raw_label, *_scaling(spec))[:, 0]
    log_t = (z - statistics["tail_max"]) - statistics["tail_log_sum"]
    absent = (z == -torch.inf) | (statistics["tail_log_sum"] == -torch.inf)
    log_t = log_t.masked_fill(absent, -torch.inf)
    return log_t.exp(), log_t.masked_fill(absent, 0.0)


def _slope(raw: Tensor, spec: RowSpec) -> Tensor | float:
    """d z / d raw, of the shape of `raw`; 0 at -inf under a softcap."""
    chain = spec.student_scale / spec.temperature
    if spec.student_softcap is None:
        return chain
    return softcap_slope(raw, spec.student_scale / spec.student_softcap).mul_(chain)
