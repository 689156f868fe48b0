"""The row operations on a GPU: from raw logits to per-token statistics, and from coefficients to the gradient.

Launches the kernels of `row_statistics_triton` and `row_gradients_triton`, or of `row_both_triton`;
`minillm.kernels.rows_torch` has the same functions, but for those that only these kernels have a use for.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from minillm.kernels.divergences import FIELDS, RowSpec
from minillm.kernels.logits_triton import transform
from minillm.kernels.row_both_triton import both_kernel
from minillm.kernels.row_gradients_triton import gradient_kernel
from minillm.kernels.row_statistics_triton import statistics_kernel
from minillm.kernels.softcap_triton import add_softcapped_kernel, softcap_gradient_kernel

STATISTICS_BLOCK, STATISTICS_WARPS = 1024, 8
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 8
SOFTCAP_BLOCK = 2048
REGISTERS = 65536  # of a multiprocessor
BOTH_BLOCK, BOTH_WARPS = 2048, 16  # fewer rows at a time, so that each is left more of the L2 cache

SECOND_PASS = tuple(name for name, field in FIELDS.items() if field.second_pass)
LOG_SUMS = {who: (f"{who}_max", f"{who}_log_sum") for who in ("student", "teacher")}
STATISTIC_SLOTS = (
    *(*LOG_SUMS["student"], *LOG_SUMS["teacher"]),
    *(name for name in FIELDS if not name.endswith("argmax")),
    *(f"mean_u_{name}" for name in SECOND_PASS if name != "tvd"),
    "interpolated_log_sum",
)
ROW_STATISTICS = (  # what the gradient reads, and the coefficient that asks for it
    ("reverse_kl", "reverse_kl"),
    ("student_entropy", "student_entropy"),
    *((f"mean_u_{name}", name) for name in SECOND_PASS if name != "tvd"),  # the gradient takes tvd's itself
    ("interpolated_log_sum", "interpolated_cross_entropy"),
)
COEFFICIENT_SLOTS = tuple(f"c_{name}" for name, field in FIELDS.items() if field.differentiable)
GRADIENT_SLOTS = (
    *(*LOG_SUMS["student"], *LOG_SUMS["teacher"]),
    *(name for name, _ in ROW_STATISTICS),
    *COEFFICIENT_SLOTS,
)


def row_statistics(
    student: Tensor,  # (C, V) raw logits h W^T + b, fp32; columns contiguous
    teacher: Tensor | None,  # (C, V) likewise, where a field needs it
    labels: Tensor | None,  # (C,) int64 in [0, V), where a field needs them
    spec: RowSpec,
) -> dict[str, Tensor]:
    """The statistics `spec.fields`, each (C,) fp32 (argmaxes int64). The logits stay as they are.

    Besides, what `row_gradients` reads: `student_max` and `student_log_sum`, which add up to the log-sum-exp; the same of
    the teacher where one is given; `mean_u_F` = E_q[u_F] for every divergence F from a mixture; and for the interpolated
    target `interpolated_log_sum`, the log-sum-exp of its logits, those of both models less their maxima.
    """
    _check(student, teacher)
    C, V = student.shape
    slots = _statistic_slots(spec, teacher is not None)
    out = torch.empty(len(slots), C, dtype=torch.float32, device=student.device)
    result = dict(zip(slots, out, strict=True))
    argmaxes = None
    if "student_argmax" in spec.fields or "teacher_argmax" in spec.fields:
        argmaxes = torch.empty(2, C, dtype=torch.int64, device=student.device)
        found = dict(zip(("student_argmax", "teacher_argmax"), argmaxes, strict=True))
        result |= {name: value for name, value in found.items() if name in spec.fields}
    if C:
        with torch.cuda.device_of(student):
            statistics_kernel[(C,)](
                student,
                teacher,
                labels,
                out,
                argmaxes,
                C,
                V,
                student.stride(0),
                0 if teacher is None else teacher.stride(0),
                **transform(spec),
                **_weights(spec),
                STUDENT_ARGMAX="student_argmax" in spec.fields,
                TEACHER_ARGMAX="teacher_argmax" in spec.fields,
                **{name.upper(): slots.get(name, -1) for name in STATISTIC_SLOTS},
                BLOCK=STATISTICS_BLOCK,
                num_warps=STATISTICS_WARPS,
            )
    return result


def _statistic_slots(spec: RowSpec, teacher: bool) -> dict[str, int]:
    names = {*LOG_SUMS["student"]} | {name for name in spec.fields if not name.endswith("argmax")}
    names |= {f"mean_u_{name}" for name in spec.fields if f"mean_u_{name}" in STATISTIC_SLOTS}
    if "interpolated_cross_entropy" in spec.fields:
        names.add("interpolated_log_sum")
    if teacher:
        names |= {*LOG_SUMS["teacher"]}
    return {name: slot for slot, name in enumerate(name for name in STATISTIC_SLOTS if name in names)}


def row_gradients(
    student: Tensor,  # (C, V) raw logits, fp32; their memory is overwritten
    teacher: Tensor | None,  # (C, V), where a coefficient needs it
    labels: Tensor | None,  # (C,) int64, where a coefficient needs them
    statistics: dict[str, Tensor],  # (C,) each: what row_statistics returned for these rows
    coefficients: dict[str, Tensor],  # (C,) each: d loss / d field; absent means zero
    spec: RowSpec,
    grad_dtype: torch.dtype,  # fp32, bf16 or fp16
) -> Tensor:
    """d loss / d raw student logits, (C, V) of `grad_dtype`, in the memory of `student`.

    A coefficient that is exactly 0 contributes exactly nothing, even where its statistic is infinite.
    """
    if not any(FIELDS[name].teacher for name in coefficients):
        teacher = None
    vectors, slots = gradient_vectors(statistics, coefficients, teacher=teacher is not None)
    labels = labels if "student_logprob" in coefficients else None
    return gradients_from_vectors(student, teacher, labels, vectors, slots, spec, grad_dtype)


def gradient_vectors(
    statistics: dict[str, Tensor],  # (C,) each
    coefficients: dict[str, Tensor],  # (C,) each
    *,
    teacher: bool,  # whether a coefficient needs it
) -> tuple[Tensor, dict[str, int]]:
    """The values that the gradient reads of these rows, (slots, C) fp32, and the slot of each."""
    models = ("student", "teacher") if teacher else ("student",)
    vectors = {name: statistics[name] for who in models for name in LOG_SUMS[who]}
    vectors |= {name: statistics[name] for name, field in ROW_STATISTICS if field in coefficients}
    vectors |= {f"c_{name}": value for name, value in coefficients.items()}
    stacked = torch.stack([value.to(torch.float32) for value in vectors.values()])
    return stacked, {name: slot for slot, name in enumerate(vectors)}


def gradients_from_vectors(
    student: Tensor,  # (C, V) raw logits, fp32, of all ids or of some; their memory is overwritten
    teacher: Tensor | None,  # (C, V), where a coefficient needs it
    labels: Tensor | None,  # (C,) int64, where a coefficient needs them; one that is no column equals none
    vectors: Tensor,  # (slots, C) fp32, of whole rows; columns contiguous
    slots: dict[str, int],
    spec: RowSpec,
    grad_dtype: torch.dtype,  # fp32, bf16 or fp16
) -> Tensor:
    """row_gradients from `gradient_vectors`. For all coefficients but tvd's the columns may be a part of the ids."""
    _check(student, teacher)
    C = student.shape[0]
    gradient = _in_place(student, grad_dtype)
    if C:
        with torch.cuda.device_of(student):
            gradient_kernel[(C,)](
                **_gradient_arguments(student, teacher, labels, gradient, vectors, spec),
                **{name.upper(): slots.get(name, -1) for name in GRADIENT_SLOTS},
                BLOCK=GRADIENT_BLOCK,
                num_warps=GRADIENT_WARPS,
            )
    return gradient


def row_loss_gradients(
    student: Tensor,  # (C, V) raw logits, fp32; their memory is overwritten
    teacher: Tensor | None,  # (C, V) likewise, where a field needs it
    labels: Tensor | None,  # (C,) int64, where a field needs them
    spec: RowSpec,
    differentiate: Callable[[slice, dict[str, Tensor]], dict[str, Tensor]],
    grad_dtype: torch.dtype,  # fp32, bf16 or fp16
) -> Tensor | None:
    """row_statistics, then row_gradients with the coefficients that differentiate(rows, statistics) returns.

    It is called once, with all rows of the chunk and their statistics, (C,) each. None where it returns none.
    """
    statistics = row_statistics(student, teacher, labels, spec)
    coefficients = differentiate(slice(None), {name: statistics[name] for name in spec.fields})
    if not coefficients:
        return None
    return row_gradients(student, teacher, labels, statistics, coefficients, spec, grad_dtype)


def row_known_gradients(
    student: Tensor,  # (C, V) raw logits, fp32; their memory is overwritten
    teacher: Tensor | None,  # (C, V) likewise, where a field needs it
    labels: Tensor | None,  # (C,) int64, where a field needs them
    spec: RowSpec,  # fields: no argmax
    coefficients: dict[str, float],  # d loss / d field, the same in every row
    grad_dtype: torch.dtype,  # fp32, bf16 or fp16
) -> tuple[dict[str, Tensor], Tensor]:
    """row_statistics, and row_gradients of a loss that is linear in them, by one launch."""
    _check(student, teacher)
    C = student.shape[0]
    slots = _statistic_slots(spec, teacher is not None)
    count = len(slots)
    slots |= {f"c_{name}": count + index for index, name in enumerate(coefficients)}
    vectors = torch.empty(len(slots), C, dtype=torch.float32, device=student.device)
    for name, value in coefficients.items():
        vectors[slots[f"c_{name}"]].fill_(value)
    gradient = _in_place(student, grad_dtype)
    if C:
        with torch.cuda.device_of(student):
            both_kernel[(C,)](
                **_gradient_arguments(student, teacher, labels, gradient, vectors, spec),
                **{name.upper(): slots.get(name, -1) for name in (*STATISTIC_SLOTS, *COEFFICIENT_SLOTS)},
                BLOCK=BOTH_BLOCK,
                num_warps=BOTH_WARPS,
                maxnreg=max(64, REGISTERS // (2 * 32 * BOTH_WARPS)),  # two programs fit on a multiprocessor
            )
    return {name: vectors[slots[name]] for name in spec.fields}, gradient


def add_softcapped(
    total: Tensor,  # (C, V) fp32; columns contiguous
    raw: Tensor,  # (C, V) fp32 raw logits of a head; `total` itself where that is to be capped in place
    scale: float,
    softcap: float,
    *,
    first: bool,
) -> None:
    """total += softcap(scale * raw), or with `first` total = it."""
    with torch.cuda.device_of(raw):
        add_softcapped_kernel[_blocks(raw)](
            total,
            raw,
            raw.shape[1],
            total.stride(0),
            raw.stride(0),
            scale / softcap,
            softcap,
            FIRST=first,
            BLOCK=SOFTCAP_BLOCK,
        )


def softcap_gradient(
    dz: Tensor,  # (C, V) fp32: d loss / d softcap(scale * raw)
    raw: Tensor,  # (C, V) fp32, overwritten
    scale: float,
    softcap: float,
) -> Tensor:
    """d loss / d raw, (C, V), in the memory of `raw`; 0 where that is -inf."""
    with torch.cuda.device_of(raw):
        softcap_gradient_kernel[_blocks(raw)](
            dz, raw, raw.shape[1], dz.stride(0), raw.stride(0), scale / softcap, scale, BLOCK=SOFTCAP_BLOCK
        )
    return raw


def _blocks(logits: Tensor) -> tuple[int, int]:
    return logits.shape[0], triton.cdiv(logits.shape[1], SOFTCAP_BLOCK)


def _in_place(student: Tensor, grad_dtype: torch.dtype) -> Tensor:
    """The memory for the gradient of these logits: their own rows, of which half precision takes the first half."""
    return student if grad_dtype == student.dtype else student.view(grad_dtype)[:, : student.shape[1]]


def _gradient_arguments(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, gradient: Tensor, vectors: Tensor, spec: RowSpec
) -> dict[str, object]:
    """The arguments of both kernels that end in a gradient."""
    return (
        transform(spec)
        | _weights(spec)
        | {
            "student": student,
            "teacher": teacher,
            "labels": labels,
            "gradient": gradient,
            "vectors": vectors,
            "slot_stride": vectors.stride(0),
            "V": student.shape[1],
            "student_stride": student.stride(0),
            "teacher_stride": 0 if teacher is None else teacher.stride(0),
            "gradient_stride": gradient.stride(0),
            "chain": spec.student_scale / spec.temperature,
        }
    )


def _weights(spec: RowSpec) -> dict[str, float]:
    """The weights of mixtures, as the kernels take them."""
    return {
        "beta": spec.beta,
        "alpha": spec.alpha,
        "part_s": 1.0 - spec.interpolation,
        "part_t": spec.interpolation,
    }


def _check(student: Tensor, teacher: Tensor | None) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
        if logits is None:
            continue
        if logits.dtype != torch.float32:
            raise ValueError(f"{name} logits are {logits.dtype}; the Triton row kernels take torch.float32 alone")
        if logits.shape != student.shape or (logits.shape[1] > 1 and logits.stride(1) != 1):
            raise ValueError(
                f"{name} logits have shape {tuple(logits.shape)} and strides {logits.stride()}; expected "
                f"{tuple(student.shape)} with contiguous columns"
            )
