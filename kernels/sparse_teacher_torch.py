"""The row operations of a TopK teacher in torch: the tail's softmax and its gradient, in blocks that fit a core's cache."""

import sys

import torch
from torch import Tensor

from minillm.kernels import rows_torch
from minillm.kernels.block_memory import BlockMemory
from minillm.kernels.chunks import logits_buffer
from minillm.kernels.divergences import RowSpec, expectation
from minillm.kernels.rows_torch import logits_from_raw, map_blocks, softcap_slope
from minillm.kernels.softmax_torch import Softmax
from minillm.kernels.sparse_teacher_rows import OutcomeRows
from minillm.kernels.workers import Worker


def tail_statistics(
    student: Tensor,  # (C, V) raw logits, -inf at the k ids; left as they are
    spec: RowSpec,
    *,
    entropy: bool,
    argmax: bool,
) -> dict[str, Tensor]:
    """As `sparse_teacher_rows.Tail` says."""

    def of_block(block: slice, worker: Worker) -> dict[str, Tensor]:
        memory = worker.memory
        tail = Softmax.of(_logits(student[block], spec, memory), memory)
        empty = tail.largest == -torch.inf
        part = {"tail_max": tail.largest, "tail_log_sum": torch.where(empty, -torch.inf, -tail.top.log())}
        if entropy:
            log_t = tail.log_probabilities(tail.z == -torch.inf)
            part["tail_entropy"] = (
                expectation(tail.probabilities(), log_t, memory).neg_().masked_fill_(empty[:, 0], 0.0)
            )
        if argmax:
            part["tail_argmax"] = tail.z.argmax(1)
        return {name: value.reshape(-1) for name, value in part.items()}

    parts = map_blocks(of_block, student)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def tail_gradients(
    student: Tensor,  # (C, V) raw logits, -inf at the k ids; their memory is overwritten
    statistics: dict[str, Tensor],  # (C,) each
    whole: Tensor,  # (C,)
    entropy: Tensor | None,  # (C,)
    spec: RowSpec,
    grad_dtype: torch.dtype,
) -> Tensor:
    """As `sparse_teacher_rows.Tail` says."""
    gradient = student if student.dtype == grad_dtype else logits_buffer(*student.shape, grad_dtype, student.device)
    chain = spec.student_scale / spec.temperature
    empty = (statistics["tail_log_sum"] == -torch.inf)[:, None]
    some_empty = student.device.type != "cpu" or bool(empty.any())
    whole, entropy = chain * whole[:, None], None if entropy is None else chain * entropy[:, None]

    def of_block(block: slice, worker: Worker) -> None:
        memory = worker.memory
        z = _logits(student[block], spec, memory)
        t = torch.softmax(z, 1, out=memory.like(z))
        if some_empty:  # a softmax of nothing is NaN
            t.masked_fill_(empty[block], 0.0)
        total = t.sum(1, keepdim=True).masked_fill_(empty[block], 1.0)  # not quite 1: torch adds up in few lanes
        factor = whole[block] / total
        slope = None
        if spec.student_softcap is not None:  # now: the gradient may take the memory of the logits
            slope = softcap_slope(student[block], spec.student_scale / spec.student_softcap, memory)
        if entropy is not None:  # u = -log t, its mean is the entropy
            surprise = torch.sub(z, statistics["tail_max"][block, None], out=memory.like(z))
            surprise.sub_(statistics["tail_log_sum"][block, None]).neg_()
            surprise.masked_fill_(z == -torch.inf, 0.0)
            factor = surprise.sub_(statistics["tail_entropy"][block, None]).mul_(entropy[block] / total).add_(factor)
        dz = gradient[block] if gradient.dtype == t.dtype and slope is None else t
        torch.mul(t, factor, out=dz)
        if slope is not None:
            dz.mul_(slope)
        if dz is t:
            gradient[block] = dz

    map_blocks(of_block, student)
    return gradient


def _logits(raw: Tensor, spec: RowSpec, memory: BlockMemory) -> Tensor:
    return logits_from_raw(raw, spec.student_scale, spec.student_softcap, spec.temperature, memory)


ROWS = OutcomeRows(rows_torch, sys.modules[__name__])
