"""The distance of two models' sorted probabilities, whose vocabularies may be different ones (ULD, arXiv 2402.12030).

    D = sum_i |p_(i) - q_(i)|

p_(i) and q_(i) are the i-th largest probabilities of teacher and student; the smaller vocabulary is filled up with zeros.
It is the Wasserstein distance of the two rows under a cost that knows no token by its meaning. With the permutation held
fixed, s_v = sign(q_v - p at v's place), the gradient by the student's logits is q_v (s_v - sum_u q_u s_u).

Of the k largest alone and the rest of each taken together, D is at most the exact one, and less by at most twice the smaller
of the two rests: sum over the rest of |p_(i) - q_(i)| lies between their difference and their sum.
"""

from dataclasses import replace

import torch
from torch import Tensor

from minillm.kernels.arguments import prepare
from minillm.kernels.chunks import CPU_BUDGET, DEVICE_BUDGET, chunk_rows, logits_buffer
from minillm.kernels.divergences import RowSpec
from minillm.kernels.head import LMHead, fp16_headroom
from minillm.kernels.model_logits import StudentGradients
from minillm.kernels.objective import attach_gradients
from minillm.kernels.problem import Chunk, Problem, Tensors
from minillm.kernels.rows_torch import logits_from_raw, softcap_slope
from minillm.kernels.softmax_torch import Softmax

BUFFERS = 7  # of the vocabulary's size in fp32, alive at a time: logits, probabilities, sorted ones, their places (int64), signs
_OPTIONS = {"temperature": 1.0, "vocab_size": None, "kept": None, "ignore_index": -100, "backend": "torch"}


def linear_sorted_distance(
    student_hidden: Tensor,  # (N, H_s)
    student_head: LMHead,  # weight (V_s, H_s)
    teacher_hidden: Tensor,  # (N, H_t)
    teacher_head: LMHead,  # weight (V_t, H_t)
    *,
    top_k: int | None = None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The sum over rows of D, and of the most that `top_k` can make it too small. Scalars, fp32 (float64 for float64).

    The gradient with respect to the student's hidden states, weight and bias is computed here, a chunk of rows at a time,
    and scaled in the backward pass. The teacher is a constant.

    Args:
        top_k: the largest probabilities that are compared one by one; None compares all of them.
        chunk_bytes: bytes of what is alive at a time; None fits them to the device.

    Raises ValueError for arguments that do not fit each other, which are named.
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, or None for all, got {top_k}")
    (ours, student), (theirs, teacher) = prepare_both(
        student_hidden, student_head, teacher_hidden, teacher_head, buffers=BUFFERS, chunk_bytes=chunk_bytes
    )
    needs = tuple(torch.is_grad_enabled() and one is not None and one.requires_grad for one in student.leaves)
    into = (ours.logits,)
    with torch.no_grad(), torch.autocast(student.device.type, enabled=False):
        sums = ours.gradients(student, needs, into)
        headroom = 1.0 if sums is None else fp16_headroom(sums.dz_dtype)
        total = torch.zeros(2, dtype=ours.logits, device=student.device)
        for mine, other in zip(ours.chunks(student, sums=sums), theirs.chunks(teacher), strict=True):
            q = probabilities(mine.student, ours.spec)
            distance, slack, signs = sorted_distance(q, probabilities(other.student, theirs.spec), top_k)
            total += torch.stack([distance.sum(), slack.sum()])
            if sums is not None:
                dz = logits_gradient(q, signs, mine.student, ours.spec)
                add_gradient(sums, dz, mine, headroom)
        if headroom != 1.0:
            sums.scale(1 / headroom)
    loss, slack = total.unbind()
    return (loss if sums is None else attach_gradients(loss, into, student.leaves, sums)), slack


def prepare_both(
    student_hidden: Tensor,  # (N, H_s)
    student_head: LMHead,
    teacher_hidden: Tensor,  # (N, H_t)
    teacher_head: LMHead,
    *,
    buffers: int,  # of both vocabularies' size, alive at a time
    chunk_bytes: int | None,
) -> tuple[tuple[Problem, Tensors], tuple[Problem, Tensors]]:
    """Student and teacher, each a model by itself with ids of its own, cut into the same chunks of rows.

    Raises ValueError for arguments that do not fit each other, which are named.
    """
    options = {**_OPTIONS, "chunk_bytes": chunk_bytes}
    fields = ("student_entropy",)  # any that reads the rows alone
    ours, student = prepare(student_hidden, student_head, None, None, None, options, fields=fields)
    names = ("teacher_hidden", "teacher_head")
    theirs, teacher = prepare(teacher_hidden, teacher_head, None, None, None, options, fields=fields, names=names)
    if ours.kept != theirs.kept:
        raise ValueError(
            f"teacher_hidden has {theirs.kept} rows, student_hidden {ours.kept}; row i of one is compared with row i of the other"
        )
    chunk = chunk_rows(
        ours.kept,
        ours.vocab_size + theirs.vocab_size,
        models=buffers,
        itemsize=max(ours.logits.itemsize, theirs.logits.itemsize),
        device=student.device,
        chunk_bytes=chunk_bytes or budget(student.device),
    )
    return (replace(ours, chunk=chunk), student), (replace(theirs, chunk=chunk), teacher)


def budget(device: torch.device) -> int:
    """Bytes that may be alive at a time. It is kept to: of so many buffers the fewest rows that fill a GPU are too many."""
    return CPU_BUDGET if device.type == "cpu" else DEVICE_BUDGET


def add_gradient(sums: StudentGradients, dz: Tensor, chunk: Chunk, headroom: float) -> None:  # (C, V)
    """Add headroom times a chunk's gradient of the raw logits, in the dtype that the products want."""
    dz = dz if headroom == 1.0 else dz.mul_(headroom)
    if dz.dtype != sums.dz_dtype:
        dz = logits_buffer(*dz.shape, sums.dz_dtype, dz.device).copy_(dz)
    sums.add(dz, chunk.student_logits, chunk.rows)


def probabilities(raw: Tensor, spec: RowSpec) -> Tensor:  # (C, V) raw logits -> (C, V)
    """softmax(softcap(scale * raw)). The raw logits stay as they are."""
    return Softmax.of(logits_from_raw(raw, spec.student_scale, spec.student_softcap, 1.0)).probabilities()


def sorted_distance(
    q: Tensor,  # (C, V_s), of the student
    p: Tensor,  # (C, V_t)
    top_k: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """D of every row (C,), the most that top_k makes it too small (C,), and dD/dq with the order held fixed (C, V_s)."""
    least = min(q.shape[1], p.shape[1])
    if top_k is not None and top_k < least:
        return _largest_and_rest(q, p, top_k)
    ours, places = q.sort(dim=1, descending=True)
    theirs = p.sort(dim=1, descending=True).values
    signs = torch.ones_like(ours)  # of ids beyond the other vocabulary: q against 0
    difference = ours[:, :least] - theirs[:, :least]
    signs[:, :least] = difference.sign()
    beyond = ours[:, least:].sum(1) + theirs[:, least:].sum(1)
    distance = difference.abs_().sum(1) + beyond
    return distance, torch.zeros_like(distance), torch.empty_like(q).scatter_(1, places, signs)


def _largest_and_rest(q: Tensor, p: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    ours, places = q.topk(k, dim=1)
    theirs = p.topk(k, dim=1).values
    rest, their_rest = (_rest(all_of, largest) for all_of, largest in ((q, ours), (p, theirs)))
    difference = ours - theirs
    signs = (rest - their_rest).sign()[:, None].expand_as(q).contiguous().scatter_(1, places, difference.sign())
    distance = difference.abs_().sum(1) + (rest - their_rest).abs()
    return distance, 2 * torch.minimum(rest, their_rest), signs


def _rest(row: Tensor, largest: Tensor) -> Tensor:  # (C, V), (C, k) -> (C,)
    """The probability beside the largest ones, summed in float64: a small rest is the difference of two sums near 1."""
    rest = row.sum(1, dtype=torch.float64) - largest.sum(1, dtype=torch.float64)
    return rest.clamp_min_(0).to(row.dtype)


def logits_gradient(
    q: Tensor,  # (C, V) probabilities
    by_q: Tensor,  # (C, V) d loss / d q; its memory is used up
    raw: Tensor,  # (C, V) raw logits that q is the softmax of
    spec: RowSpec,
) -> Tensor:
    """d loss / d raw logits, (C, V)."""
    by_q -= (q * by_q).sum(1, keepdim=True)
    return raw_gradient(by_q.mul_(q), raw, spec)


def raw_gradient(dz: Tensor, raw: Tensor, spec: RowSpec) -> Tensor:  # (C, V) each
    """d loss / d raw logits from that of softcap(scale * raw), in its memory."""
    if spec.student_softcap is not None:
        dz.mul_(softcap_slope(raw, spec.student_scale / spec.student_softcap))
    return dz if spec.student_scale == 1.0 else dz.mul_(spec.student_scale)
