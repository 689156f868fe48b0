"""The row operations in torch: from raw logits to per-token statistics, and from coefficients to the gradient.

Rows go through in blocks that fit a core's cache, so that the many elementwise passes cost little beside the GEMMs.
`minillm.kernels.rows_triton` has the same functions. All are called without autograd.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from minillm.kernels.block_memory import FRESH, BlockMemory
from minillm.kernels.chunks import logits_buffer
from minillm.kernels.divergences import FAR, FIELDS, Rows, RowSpec
from minillm.kernels.softmax_torch import ALL, Ids, Softmax
from minillm.kernels.workers import Worker, pieces, share, workers_on

BLOCK_BYTES = 4 * 2**20  # of one (B, V) temporary of all workers on a CPU: smaller ones have them wait for each other
DEVICE_BLOCK_BYTES = 64 * 2**20  # elsewhere
T = TypeVar("T")


def row_statistics(
    student: Tensor,  # (C, V) raw logits h W^T + b, fp32 or fp64
    teacher: Tensor | None,  # (C, V), where a field needs it
    labels: Tensor | None,  # (C,) int64 in [0, V), where a field needs them
    spec: RowSpec,
    ids: Ids | None = None,
) -> dict[str, Tensor]:
    """The statistics `spec.fields`, each (C,) in the dtype of the logits (argmaxes int64). The logits stay as they are.

    Besides: `student_max` and `student_log_sum`, which add up to the log-sum-exp; the same of the teacher where one is
    given.
    """

    def of_block(block: slice, worker: Worker) -> dict[str, Tensor]:
        return _block_statistics(
            student[block],
            None if teacher is None else teacher[block],
            None if labels is None else labels[block, None],
            spec,
            ids or ALL,
            worker.memory,
            graded=False,
        )[0]

    parts = map_blocks(of_block, student, ids)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def row_gradients(
    student: Tensor,  # (C, V) raw logits; their memory is overwritten
    teacher: Tensor | None,  # (C, V), where a coefficient needs it
    labels: Tensor | None,  # (C,) int64, where a coefficient needs them
    statistics: dict[str, Tensor],  # (C,) each: what row_statistics returned for these rows
    coefficients: dict[str, Tensor],  # (C,) each: d loss / d field; absent means zero
    spec: RowSpec,
    grad_dtype: torch.dtype,
    ids: Ids | None = None,
) -> Tensor:
    """d loss / d raw student logits, (C, V) of `grad_dtype`: the gradient of the module `divergences`, chained on.

    A coefficient that is exactly 0 contributes exactly nothing, even where its statistic is infinite.
    """
    gradient = student if student.dtype == grad_dtype else logits_buffer(*student.shape, grad_dtype, student.device)
    if not any(FIELDS[name].teacher for name in coefficients):
        teacher = None
    softmax = (ids or ALL).softmax

    def of_block(block: slice, worker: Worker) -> None:
        memory = worker.memory
        here = {name: value[block, None] for name, value in statistics.items()}
        chosen = {name: value[block, None] for name, value in coefficients.items()}
        models = {"student": softmax(logits_from_raw(student[block], *_scaling(spec, "student"), memory), memory)}
        if teacher is not None:
            models["teacher"] = softmax(logits_from_raw(teacher[block], *_scaling(spec, "teacher"), memory), memory)
        slope = spec.student_softcap is not None
        rows = _rows(spec, **models, fields=set(chosen), values=False, slope=slope, softmax=softmax, memory=memory)
        label = labels[block, None] if "student_logprob" in coefficients else None
        _block_gradients(gradient[block], student[block], label, rows, here, chosen, spec, ids or ALL)

    map_blocks(of_block, student, ids)
    return gradient


def row_loss_gradients(
    student: Tensor,  # (C, V) raw logits; their memory is overwritten
    teacher: Tensor | None,  # (C, V), where a field needs it
    labels: Tensor | None,  # (C,) int64, where a field needs them
    spec: RowSpec,
    differentiate: Callable[[slice, dict[str, Tensor]], dict[str, Tensor]],
    grad_dtype: torch.dtype,
    ids: Ids | None = None,
) -> Tensor | None:
    """row_statistics and row_gradients in one pass: a block's probabilities are used while a cache still has them.

    differentiate(rows, statistics) is called with a block of rows of this chunk and their statistics, (B,) each, and
    returns their coefficients, (B,) each: one block after the other, in their order. None where it never returned any.
    """
    gradient = student if student.dtype == grad_dtype else logits_buffer(*student.shape, grad_dtype, student.device)

    def of_block(block: slice, worker: Worker) -> bool:
        label = None if labels is None else labels[block, None]
        statistics, rows = _block_statistics(
            student[block],
            None if teacher is None else teacher[block],
            label,
            spec,
            ids or ALL,
            worker.memory,
            graded=True,
        )
        with worker.turn:
            coefficients = differentiate(block, {name: statistics[name] for name in spec.fields})
        if not coefficients:
            gradient[block] = 0.0
            return False
        here = {name: value[:, None] for name, value in statistics.items()}
        chosen = {name: value[:, None] for name, value in coefficients.items()}
        _block_gradients(gradient[block], student[block], label, rows, here, chosen, spec, ids or ALL)
        return True

    return gradient if any(map_blocks(of_block, student, ids)) else None


def logits_from_raw(
    raw: Tensor, scale: float, softcap: float | None, temperature: float, memory: BlockMemory = FRESH
) -> Tensor:
    """softcap(scale * raw) / temperature, where -inf stays -inf. `raw` itself where all three are neutral."""
    z = raw if scale == 1.0 else torch.mul(raw, scale, out=memory.like(raw))
    if softcap is not None:
        z = torch.div(z, softcap, out=memory.like(raw)).tanh_().mul_(softcap)
        with memory.passing():
            z.masked_fill_(torch.eq(raw, -torch.inf, out=memory.like(raw, torch.bool)), -torch.inf)
    return z if temperature == 1.0 else torch.div(z, temperature, out=memory.like(raw))


def add_softcapped(
    total: Tensor,  # (C, V)
    raw: Tensor,  # (C, V) raw logits of a head; `total` itself where that is to be capped in place
    scale: float,
    softcap: float,
    *,
    first: bool,
) -> None:
    """total += softcap(scale * raw), or with `first` total = it."""

    def of_block(block: slice, worker: Worker) -> None:
        z = logits_from_raw(raw[block], scale, softcap, 1.0, worker.memory)
        total[block] = z if first else z.add_(total[block])

    map_blocks(of_block, raw)


def softcap_gradient(
    dz: Tensor,  # (C, V) d loss / d softcap(scale * raw)
    raw: Tensor,  # (C, V), overwritten
    scale: float,
    softcap: float,
) -> Tensor:
    """d loss / d raw, (C, V), in the memory of `raw`; 0 where that is -inf."""

    def of_block(block: slice, worker: Worker) -> None:
        slope = softcap_slope(raw[block], scale / softcap, worker.memory).mul_(scale)
        torch.mul(slope, dz[block], out=raw[block])

    map_blocks(of_block, raw)
    return raw


def softcap_slope(raw: Tensor, inner: float, memory: BlockMemory = FRESH) -> Tensor:
    """1 - tanh(inner * raw)^2 without cancellation; 0 at an infinite raw."""
    slope = memory.like(raw)
    with memory.passing():
        e = torch.mul(raw, -2 * inner, out=memory.like(raw)).abs_().neg_().exp_()
        return torch.mul(e, 4.0, out=slope).div_(e.add_(1.0).square_())


def map_blocks(work: Callable[[slice, Worker], T], logits: Tensor, ids: Ids | None = None) -> list[T]:  # (C, V)
    """work(block, worker) of blocks of rows, in their order.

    Ranks that share the ids meet in every block: theirs are alike however many threads each has, and one after the other.
    """
    budget = BLOCK_BYTES if logits.device.type == "cpu" else DEVICE_BLOCK_BYTES
    if ids is not None:
        rows = max(1, budget // (ids.widest(logits) * logits.element_size()))
        return [work(block, Worker()) for block in pieces(len(logits), rows)]
    rows = max(1, budget // (workers_on(logits) * logits.shape[1] * logits.element_size()))
    return share(work, pieces(len(logits), rows), logits)


def _block_statistics(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    spec: RowSpec,
    ids: Ids,
    memory: BlockMemory,
    *,
    graded: bool,
) -> tuple[dict[str, Tensor], Rows | None]:
    """The statistics, and the distributions that they and, where `graded`, the gradient are made of."""
    models = {"student": ids.softmax(logits_from_raw(student, *_scaling(spec, "student"), memory), memory)}
    if teacher is not None:
        models["teacher"] = ids.softmax(logits_from_raw(teacher, *_scaling(spec, "teacher"), memory), memory)
    result, sums = {}, {}
    for who, model in models.items():
        result |= {f"{who}_max": model.largest, f"{who}_log_sum": -model.top.log()}
        if f"{who}_logprob" in spec.fields:
            sums[f"{who}_logprob"] = ids.logprob(model, labels)
        if f"{who}_argmax" in spec.fields:
            result[f"{who}_argmax"] = ids.argmax(model)
    rows = None
    if graded or any(FIELDS[name].value for name in spec.fields):
        slope = graded and spec.student_softcap is not None
        fields = set(spec.fields)
        rows = _rows(spec, **models, fields=fields, values=True, slope=slope, softmax=ids.softmax, memory=memory)
        for name in spec.fields:
            if FIELDS[name].value is not None:
                with memory.passing():
                    sums[name] = FIELDS[name].value(rows, spec)
    result |= ids.sums({name: value.reshape(-1) for name, value in sums.items()})
    return {name: value.reshape(-1) for name, value in result.items()}, rows


def _scaling(spec: RowSpec, who: str) -> tuple[float, float | None, float]:
    return getattr(spec, f"{who}_scale"), getattr(spec, f"{who}_softcap"), spec.temperature


def _rows(
    spec: RowSpec,
    student: Softmax,
    teacher: Softmax | None = None,
    *,
    fields: set[str],
    values: bool,
    slope: bool,
    softmax: Callable[[Tensor, BlockMemory], Softmax],
    memory: BlockMemory,
) -> Rows:
    """The rows that gradients of `fields` read; `values`: and their values; `slope`: and the derivative of a softcap.

    The logits stay as they are; the teacher's probabilities go where no field needs them.
    """
    second_pass = any(FIELDS[name].second_pass for name in fields)
    interpolated = "interpolated_cross_entropy" in fields
    rows = Rows(q=student.probabilities(), memory=memory)
    if interpolated:
        rows.target = _interpolated(student, teacher, spec.interpolation, softmax, memory)
    if second_pass or fields & {"forward_kl", "teacher_entropy"}:
        rows.p = teacher.probabilities()
    sound = False  # known to hold no -inf
    if second_pass or fields & {"reverse_kl", "forward_kl"} or (interpolated and values and spec.interpolation == 1):
        # differences from the largest first, and the two sums' ratio, not log-sum-exps: neither a large maximum nor a
        # large vocabulary must cost the log-ratio its last digits
        rows.r = torch.sub(student.z, student.largest, out=memory.like(student.z))
        with memory.passing():
            room = teacher.softmax if rows.p is None else memory.like(teacher.z)
            rows.r.sub_(torch.sub(teacher.z, teacher.largest, out=room)).add_((student.top / teacher.top).log())
        # an infinity or NaN anywhere shows in the sum, which a CPU can afford to look at
        sound = rows.r.device.type == "cpu" and bool(rows.r.sum().isfinite())
        if not sound:
            _replace_infinite(rows, student, teacher)
    elif "student_entropy" in fields or (interpolated and values) or slope:
        rows.student_banned = _banned(student.z)
    if "student_entropy" in fields or (interpolated and values):
        rows.log_q = student.log_probabilities(rows.student_banned)
    if "teacher_entropy" in fields:
        rows.log_p = teacher.log_probabilities(None if sound else _banned(teacher.z))
    return rows


def _interpolated(
    student: Softmax,
    teacher: Softmax,
    weight: float,
    softmax: Callable[[Tensor, BlockMemory], Softmax],
    memory: BlockMemory,
) -> Tensor:  # (B, V)
    """The softmax of (1 - weight) z_s + weight z_t; a model of weight 0 bans nothing."""
    if weight in (0, 1):
        model = teacher if weight else student
        z = torch.sub(model.z, model.largest, out=memory.like(model.z))
    else:  # from the largest, which costs no digits where both models' logits are
        z = torch.sub(student.z, student.largest, out=memory.like(student.z)).mul_(1 - weight)
        with memory.passing():
            z.add_(torch.sub(teacher.z, teacher.largest, out=memory.like(teacher.z)).mul_(weight))
    return softmax(z, memory).probabilities()


def _banned(z: Tensor) -> Tensor | None:
    """A mask of the entries of z that are -inf, (B, V) bool; None without any, which a CPU can afford to ask."""
    if z.device.type == "cpu" and z.amin() > -torch.inf:  # false for NaN too, which could hide an infinity
        return None
    return z == -torch.inf


def _replace_infinite(rows: Rows, student: Softmax, teacher: Softmax) -> None:
    """Infinite entries of r as `divergences` says, and the rows whose KLs are infinite."""
    student_banned, teacher_banned = _banned(student.z), _banned(teacher.z)
    rows.student_banned = student_banned
    if student_banned is None and teacher_banned is None:
        return
    if student_banned is None:
        student_banned = torch.zeros_like(teacher_banned)
    if teacher_banned is None:
        teacher_banned = torch.zeros_like(student_banned)
    rows.r.masked_fill_(student_banned, -FAR).masked_fill_(teacher_banned, FAR)
    rows.r.masked_fill_(student_banned & teacher_banned, 0.0)
    nothing = (student.largest == -torch.inf) | (teacher.largest == -torch.inf)
    rows.r.masked_fill_(nothing, torch.nan)  # no id at all is no distribution
    rows.student_only = (teacher_banned & ~student_banned).any(1)
    rows.teacher_only = (student_banned & ~teacher_banned).any(1)


def _block_gradients(
    gradient: Tensor,
    student: Tensor,
    labels: Tensor | None,
    rows: Rows,
    statistics: dict[str, Tensor],
    coefficients: dict[str, Tensor],
    spec: RowSpec,
    ids: Ids,
) -> None:
    """Writes the block's gradient; uses up `rows`."""
    chain = spec.student_scale / spec.temperature
    c = coefficients if chain == 1.0 else {name: value * chain for name, value in coefficients.items()}
    slope = None
    if spec.student_softcap is not None:  # now: the gradient may take the memory of the logits
        slope = softcap_slope(student, spec.student_scale / spec.student_softcap, rows.memory)
    # what is constant in a row: minus the mean of u under q
    constant = torch.zeros_like(rows.q[:, :1])
    bracket = None
    read_off = {"forward_kl", "interpolated_cross_entropy", "student_logprob"}
    # in the same order in every process: of sets it changes from run to run
    for name in sorted(set(c) - read_off, key=lambda name: (not FIELDS[name].second_pass, name)):
        if FIELDS[name].second_pass:
            u = FIELDS[name].u(rows, spec)
            # of this very u: where q is almost 1, a saved mean that differs in rounding would ruin tvd's signs
            mean = ids.sums({name: rows.mean(rows.q, u)})[name][:, None]
        else:  # these two overwrite what u is read from, so they come last
            mean, u = statistics[name], rows.r if name == "reverse_kl" else rows.log_q.neg_()
        constant = constant - torch.where(c[name] == 0, 0.0, c[name] * mean)
        u = u.mul_(c[name])
        bracket = u if bracket is None else bracket.add_(u)
    targets = {"forward_kl": rows.p, "interpolated_cross_entropy": rows.target}
    targets = {name: target for name, target in targets.items() if name in c}
    for name in targets:
        constant = constant + c[name]
    if "student_logprob" in c:
        constant = constant - c["student_logprob"]
    dz = gradient if gradient.dtype == rows.q.dtype else rows.q
    torch.mul(rows.q, constant if bracket is None else bracket.add_(constant), out=dz)
    for name, target in targets.items():
        dz.sub_(target.mul_(c[name]))
    if "student_logprob" in c:
        ids.add_at_label(dz, labels, c["student_logprob"])
    if slope is not None:
        dz.mul_(slope)
        if rows.student_banned is not None:
            dz.masked_fill_(rows.student_banned, 0.0)
    if dz is not gradient:
        gradient.copy_(dz)
