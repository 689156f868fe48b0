"""The row operations in torch: from raw logits to per-token statistics, and from coefficients to the gradient.

Rows go through in blocks that fit a core's cache, so that the many elementwise passes cost little beside the GEMMs.
`minillm.kernels.rows_triton` has the same functions. All are called without autograd.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from minillm.kernels.divergences import FAR, FIELDS, Rows, RowSpec, expectation

BLOCK_BYTES = 2 * 2**20  # of one (B, V) temporary on a CPU: they stay in its caches, and calls cost little beside them
DEVICE_BLOCK_BYTES = 64 * 2**20  # elsewhere


def row_statistics(
    student: Tensor,  # (C, V) raw logits h W^T + b, fp32 or fp64
    teacher: Tensor | None,  # (C, V), where a field needs it
    labels: Tensor | None,  # (C,) int64 in [0, V), where a field needs them
    spec: RowSpec,
) -> dict[str, Tensor]:
    """The statistics `spec.fields`, each (C,) in the dtype of the logits (argmaxes int64). The logits stay as they are.

    Besides: `student_lse`, and `teacher_lse` where a teacher is given. `row_gradients` reads them.
    """
    blocks = [
        _block_statistics(
            student[block],
            None if teacher is None else teacher[block],
            None if labels is None else labels[block, None],
            spec,
            graded=False,
        )[0]
        for block in _blocks(student)
    ]
    return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


def row_gradients(
    student: Tensor,  # (C, V) raw logits; their memory is overwritten
    teacher: Tensor | None,  # (C, V), where a coefficient needs it
    labels: Tensor | None,  # (C,) int64, where a coefficient needs them
    statistics: dict[str, Tensor],  # (C,) each: what row_statistics returned for these rows
    coefficients: dict[str, Tensor],  # (C,) each: d loss / d field; absent means zero
    spec: RowSpec,
    grad_dtype: torch.dtype,
) -> Tensor:
    """d loss / d raw student logits, (C, V) of `grad_dtype`: the gradient of the module `divergences`, chained on.

    A coefficient that is exactly 0 contributes exactly nothing, even where its statistic is infinite.
    """
    gradient = student if student.dtype == grad_dtype else torch.empty_like(student, dtype=grad_dtype)
    if not any(FIELDS[name].teacher for name in coefficients):
        teacher = None
    for block in _blocks(student):
        here = {name: value[block, None] for name, value in statistics.items()}
        chosen = {name: value[block, None] for name, value in coefficients.items()}
        rows = _rows_again(student[block], None if teacher is None else teacher[block], here, chosen, spec)
        label = labels[block, None] if "student_logprob" in coefficients else None
        _block_gradients(gradient[block], student[block], label, rows, here, chosen, spec)
    return gradient


def row_loss_gradients(
    student: Tensor,  # (C, V) raw logits; their memory is overwritten
    teacher: Tensor | None,  # (C, V), where a field needs it
    labels: Tensor | None,  # (C,) int64, where a field needs them
    spec: RowSpec,
    differentiate: Callable[[slice, dict[str, Tensor]], dict[str, Tensor]],
    grad_dtype: torch.dtype,
) -> Tensor | None:
    """row_statistics and row_gradients in one pass: a block's probabilities are used while a cache still has them.

    differentiate(rows, statistics) is called with a block of rows of this chunk and their statistics, (B,) each, and
    returns their coefficients, (B,) each. None where it never returned any.
    """
    gradient = student if student.dtype == grad_dtype else torch.empty_like(student, dtype=grad_dtype)
    found = False
    for block in _blocks(student):
        label = None if labels is None else labels[block, None]
        statistics, rows = _block_statistics(
            student[block], None if teacher is None else teacher[block], label, spec, graded=True
        )
        coefficients = differentiate(block, {name: statistics[name] for name in spec.fields})
        if coefficients:
            here = {name: value[:, None] for name, value in statistics.items()}
            chosen = {name: value[:, None] for name, value in coefficients.items()}
            _block_gradients(gradient[block], student[block], label, rows, here, chosen, spec)
            found = True
        else:
            gradient[block] = 0.0
    return gradient if found else None


def logits_from_raw(raw: Tensor, scale: float, softcap: float | None, temperature: float) -> Tensor:
    """softcap(scale * raw) / temperature, where -inf stays -inf. `raw` itself where all three are neutral."""
    z = raw if scale == 1.0 else raw * scale
    if softcap is not None:
        z = (z / softcap).tanh_().mul_(softcap).masked_fill_(raw == -torch.inf, -torch.inf)
    return z if temperature == 1.0 else z / temperature


def _blocks(logits: Tensor) -> Iterator[slice]:
    budget = BLOCK_BYTES if logits.device.type == "cpu" else DEVICE_BLOCK_BYTES
    rows = max(1, budget // (logits.shape[1] * logits.element_size()))
    for start in range(0, logits.shape[0], rows):
        yield slice(start, start + rows)


def _banned(z: Tensor) -> Tensor | None:
    """Where z is -inf, (B, V) bool; None where nowhere, which a CPU can afford to ask."""
    if z.device.type == "cpu" and z.amin() > -torch.inf:  # false for NaN too, which could hide an infinity
        return None
    return z == -torch.inf


def _log_ratio(r: Tensor, student_banned: Tensor | None, teacher_banned: Tensor | None) -> dict[str, Tensor | None]:
    """r with its infinite entries replaced as `divergences` says, and the rows whose KLs are infinite."""
    if student_banned is None and teacher_banned is None:
        return {"r": r}
    if student_banned is None:
        student_banned = torch.zeros_like(teacher_banned)
    if teacher_banned is None:
        teacher_banned = torch.zeros_like(student_banned)
    r.masked_fill_(student_banned, -FAR).masked_fill_(teacher_banned, FAR)
    r.masked_fill_(student_banned & teacher_banned, 0.0)
    nothing = student_banned.all(1, keepdim=True) | teacher_banned.all(1, keepdim=True)
    r.masked_fill_(nothing, torch.nan)  # no id at all is no distribution
    return {
        "r": r,
        "student_only": (teacher_banned & ~student_banned).any(1),
        "teacher_only": (student_banned & ~teacher_banned).any(1),
    }


def _softmax(z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z - max z and its exponential, both (B, V); the exponential's sum and the log-sum-exp of z, both (B, 1)."""
    largest = z.amax(1, keepdim=True)
    x = z - largest
    e = x.exp()
    total = e.sum(1, keepdim=True)
    return x, e, total, total.log().add_(largest)


def _filled(log_q: Tensor, banned: Tensor | None) -> Tensor:
    return log_q if banned is None else log_q.masked_fill_(banned, 0.0)


def _block_statistics(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, spec: RowSpec, *, graded: bool
) -> tuple[dict[str, Tensor], Rows | None]:
    """The statistics, and the distributions that they and, where `graded`, the gradient are made of."""
    fields = set(spec.fields)
    second_pass = spec.needs("second_pass")
    z_s = logits_from_raw(student, spec.student_scale, spec.student_softcap, spec.temperature)
    x_s, q, sum_s, lse_s = _softmax(z_s)
    result = {"student_lse": lse_s}
    if "student_logprob" in fields:
        result["student_logprob"] = x_s.gather(1, labels) - sum_s.log()
    if "student_argmax" in fields:
        result["student_argmax"] = z_s.argmax(1)
    if teacher is not None:
        z_t = logits_from_raw(teacher, spec.teacher_scale, spec.teacher_softcap, spec.temperature)
        x_t, p, sum_t, lse_t = _softmax(z_t)
        result["teacher_lse"] = lse_t
        if "teacher_logprob" in fields:
            result["teacher_logprob"] = x_t.gather(1, labels) - sum_t.log()
        if "teacher_argmax" in fields:
            result["teacher_argmax"] = z_t.argmax(1)

    if not graded and not any(FIELDS[name].value for name in fields):
        return {name: value.reshape(-1) for name, value in result.items()}, None
    rows = Rows(q=q.mul_(sum_s.reciprocal()))
    ratio_needed = second_pass or fields & {"reverse_kl", "forward_kl"}
    if ratio_needed or "student_entropy" in fields or graded and spec.student_softcap:
        rows.student_banned = _banned(z_s)
    if teacher is not None:
        teacher_banned = _banned(z_t) if ratio_needed or "teacher_entropy" in fields else None
        if second_pass or fields & {"forward_kl", "teacher_entropy"}:
            rows.p = p.mul_(sum_t.reciprocal())
        if ratio_needed:
            # from sums, not from log-sum-exps: a large maximum must not cost the ratio its last digits
            r = (x_s - x_t).sub_((sum_s / sum_t).log())
            vars(rows).update(_log_ratio(r, rows.student_banned, teacher_banned))
        if "teacher_entropy" in fields:
            rows.log_p = _filled(x_t.sub_(sum_t.log()), teacher_banned)
    if "student_entropy" in fields:
        rows.log_q = _filled(x_s.sub_(sum_s.log()), rows.student_banned)
    for name in spec.fields:
        if FIELDS[name].value is not None:
            result[name] = FIELDS[name].value(rows, spec)
    return {name: value.reshape(-1) for name, value in result.items()}, rows


def _rows_again(
    student: Tensor,
    teacher: Tensor | None,
    statistics: dict[str, Tensor],
    coefficients: dict[str, Tensor],
    spec: RowSpec,
) -> Rows:
    """What _block_statistics knew of the rows, from the logits and their log-sum-exps."""
    z_s = logits_from_raw(student, spec.student_scale, spec.student_softcap, spec.temperature)
    log_q = z_s - statistics["student_lse"]
    rows = Rows(q=log_q.exp())
    if teacher is not None or "student_entropy" in coefficients or spec.student_softcap:
        rows.student_banned = _banned(z_s)
    if teacher is not None:
        z_t = logits_from_raw(teacher, spec.teacher_scale, spec.teacher_softcap, spec.temperature)
        r = (z_s - z_t).sub_(statistics["student_lse"] - statistics["teacher_lse"])
        vars(rows).update(_log_ratio(r, rows.student_banned, _banned(z_t)))
        rows.p = (z_t - statistics["teacher_lse"]).exp_()
    if "student_entropy" in coefficients:
        rows.log_q = _filled(log_q, rows.student_banned)
    return rows


def _block_gradients(
    gradient: Tensor,
    student: Tensor,
    labels: Tensor | None,
    rows: Rows,
    statistics: dict[str, Tensor],
    coefficients: dict[str, Tensor],
    spec: RowSpec,
) -> None:
    """Writes the block's gradient; uses up `rows`."""
    chain = spec.student_scale / spec.temperature
    c = coefficients if chain == 1.0 else {name: value * chain for name, value in coefficients.items()}
    slope = None
    if spec.student_softcap is not None:  # now: the gradient may take the memory of the logits
        z_s = logits_from_raw(student, spec.student_scale, spec.student_softcap, spec.temperature)
        slope = (z_s * (spec.temperature / spec.student_softcap)).square_().neg_().add_(1.0)
    # what is constant in a row: minus the mean of u under q
    constant = torch.zeros_like(statistics["student_lse"])
    bracket = None
    for name in sorted(set(c) - {"forward_kl", "student_logprob"}, key=lambda name: not FIELDS[name].second_pass):
        if FIELDS[name].second_pass:
            u = FIELDS[name].u(rows, spec)
            # of this very u: where q is almost 1, a saved mean that differs in rounding would ruin tvd's signs
            mean = expectation(rows.q, u)[:, None]
        else:  # these two overwrite what u is read from, so they come last
            mean, u = statistics[name], rows.r if name == "reverse_kl" else rows.log_q.neg_()
        constant = constant - torch.where(c[name] == 0, 0.0, c[name] * mean)
        u = u.mul_(c[name])
        bracket = u if bracket is None else bracket.add_(u)
    if "forward_kl" in c:
        constant = constant + c["forward_kl"]
    if "student_logprob" in c:
        constant = constant - c["student_logprob"]
    dz = gradient if gradient.dtype == rows.q.dtype else rows.q
    torch.mul(rows.q, constant if bracket is None else bracket.add_(constant), out=dz)
    if "forward_kl" in c:
        dz.sub_(rows.p.mul_(c["forward_kl"]))
    if "student_logprob" in c:
        dz.scatter_add_(1, labels, c["student_logprob"])
    if slope is not None:
        dz.mul_(slope)
        if rows.student_banned is not None:
            dz.masked_fill_(rows.student_banned, 0.0)
    if dz is not gradient:
        gradient.copy_(dz)
