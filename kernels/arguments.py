"""From the arguments that every entry point shares to a Problem and its Tensors."""

import importlib.util
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minillm.kernels.argument_checks import (
    check_fields,
    check_head,
    check_hidden,
    check_labels,
    check_positive,
    check_softcap,
    check_vocab_size,
    check_weight,
    is_int,
    under_autocast,
)
from minillm.kernels.chunks import TILE_BYTES, TILE_IDS, chunk_rows, keep_rows
from minillm.kernels.divergences import RowSpec
from minillm.kernels.head import LMHead
from minillm.kernels.model_logits import HeadSpec, HeadTensors
from minillm.kernels.problem import Problem, Tensors
from minillm.kernels.share_sums import SHARED_FIELDS
from minillm.kernels.sparse_teacher import OUTCOME_BUFFERS, RowChecks, SparseRows, TopK, check_sayable, check_top_k

BACKENDS = ("auto", "torch", "triton", "tiled")


def prepare(
    student_hidden: Tensor,  # (..., H_s)
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor | TopK | None,  # (..., H_t)
    teacher_head: LMHead | Tensor | None,  # None with a TopK
    labels: Tensor | None,  # (...)
    options: Mapping[str, Any],  # all that an entry point declares
    *,
    fields: str | Iterable[str] | None,
    names: tuple[str, str] = ("student_hidden", "student_head"),
) -> tuple[Problem, Tensors]:
    """Check everything and flatten. Raises ValueError naming the argument."""
    student = check_head(student_head, names[1])
    check_hidden(student_hidden, student, *names)
    shape = student_hidden.shape[:-1]
    top_k = teacher_hidden if isinstance(teacher_hidden, TopK) else None
    if top_k is not None:
        size = check_vocab_size(student, None, options["vocab_size"], names[1])
        check_top_k(top_k, teacher_head, shape, student_hidden.device, size, options["temperature"])
        fields = check_sayable(fields, has_labels=labels is not None)
        teacher_hidden = None
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head go together: pass both, or None for both")
    teacher = None if teacher_head is None else check_head(teacher_head, "teacher_head")
    if teacher is not None:
        check_hidden(teacher_hidden, teacher, "teacher_hidden", "teacher_head")
        if teacher_hidden.shape[:-1] != shape:
            raise ValueError(
                f"teacher_hidden has leading dimensions {tuple(teacher_hidden.shape[:-1])}, student_hidden "
                f"{tuple(shape)}; row i of both must be the same token"
            )
        if teacher_hidden.device != student_hidden.device:
            raise ValueError(
                f"teacher_hidden is on {teacher_hidden.device}, student_hidden on {student_hidden.device}; "
                "move them to one device"
            )
    size = check_vocab_size(student, teacher, options["vocab_size"], names[1])
    fields = check_fields(fields, has_teacher=teacher is not None or top_k is not None, has_labels=labels is not None)
    spec = RowSpec(
        fields=fields,
        temperature=check_positive(options["temperature"], "temperature"),
        student_scale=check_positive(student.logit_scale, f"{names[1]}.logit_scale"),
        student_softcap=check_softcap(student, names[1]),
        teacher_scale=1.0 if teacher is None else check_positive(teacher.logit_scale, "teacher_head.logit_scale"),
        teacher_softcap=None if teacher is None else check_softcap(teacher, "teacher_head"),
        **{name: check_weight(options[name], name) for name in ("beta", "alpha") if name in options},
    )
    if not spec.needs("teacher"):
        teacher_hidden = teacher = top_k = None
    kept = options["kept"]
    vouched = kept is not None and student_hidden.device.type != "cpu"  # then nothing looks at labels and ids
    if labels is not None:
        labels = check_labels(labels, shape, student_hidden.device).reshape(-1).contiguous()
    sparse = checks = None
    if top_k is not None:
        sparse = SparseRows(_rows(_constant(top_k.ids)), _rows(_constant(top_k.logprobs)))
        checks = RowChecks(sparse, size, labels if "teacher_logprob" in fields else None)
    if labels is not None:
        index, kept = keep_rows(labels, options["ignore_index"], size, kept, checks)
    else:
        index, kept = None, shape.numel()
        if checks is not None and not vouched:
            checks.report(torch.stack(checks.counts(None)).tolist(), kept)
    if sparse is not None and vouched:
        sparse = sparse._replace(ids=sparse.ids.clamp(0, size - 1))
    if not spec.needs("labels"):
        labels = None
    elif vouched:
        labels = labels.clamp(0, size - 1)
    wide = torch.float64 in (student_hidden.dtype, None if teacher is None else teacher_hidden.dtype)
    logits = torch.float64 if wide else torch.float32
    device, chunk_bytes = student_hidden.device, options["chunk_bytes"]
    if chunk_bytes is not None and not (is_int(chunk_bytes) and chunk_bytes > 0):
        raise ValueError(f"chunk_bytes must be a positive integer, got {chunk_bytes!r}")
    if options["backend"] == "tiled" and sparse is not None:
        raise ValueError("backend='tiled' does not offer a TopK as teacher_hidden; use backend='triton' or 'auto'")
    backend = _backend(options["backend"], device, logits, fields)
    if backend == "tiled":
        ids, chunk_bytes = min(size, TILE_IDS), chunk_bytes or TILE_BYTES
    else:
        ids = size if sparse is None else size + OUTCOME_BUFFERS * (sparse.ids.shape[1] + 1)
    problem = Problem(
        spec=spec,
        shape=shape,
        kept=kept,
        vocab_size=size,
        chunk=chunk_rows(
            kept,
            ids,
            models=1 if teacher is None else 2,
            itemsize=logits.itemsize,
            device=device,
            chunk_bytes=chunk_bytes,
        ),
        student=(HeadSpec(_compute_dtype(student_hidden)),),
        teacher=None if teacher is None else (HeadSpec(_compute_dtype(teacher_hidden)),),
        logits=logits,
        backend=backend,
        sparse_teacher=sparse is not None,
    )
    tensors = Tensors(
        student=(HeadTensors(_rows(student_hidden), student.weight, student.bias),),
        teacher=sparse
        if teacher is None
        else (
            HeadTensors(
                _rows(_constant(teacher_hidden)),
                _constant(teacher.weight)[:size],
                None if teacher.bias is None else _constant(teacher.bias)[:size],
            ),
        ),
        labels=None if labels is None else _constant(labels),
        kept=index,
    )
    return problem, tensors


def _rows(hidden: Tensor) -> Tensor:  # (..., H) -> (N, H)
    return hidden.reshape(-1, hidden.shape[-1])


def accumulation(weight_grad: Any, tensors: Tensors, logits: torch.dtype) -> tuple[torch.dtype | Tensor, ...]:
    """What `weight_grad` means for the weight of every head of the student. Raises ValueError naming it."""
    return tuple(_accumulation(weight_grad, head.weight, logits) for head in tensors.student)


def _accumulation(weight_grad: Any, weight: Tensor, logits: torch.dtype) -> torch.dtype | Tensor:
    if isinstance(weight_grad, Tensor):
        if weight_grad.shape != weight.shape or weight_grad.device != weight.device:
            raise ValueError(
                f"weight_grad is a tensor of shape {tuple(weight_grad.shape)} on {weight_grad.device}; to add into it, "
                f"it must have the weight's shape {tuple(weight.shape)} on {weight.device}"
            )
        if not weight_grad.is_floating_point() or weight_grad.requires_grad:
            raise ValueError("weight_grad must be a floating-point tensor that requires no grad, such as a main_grad")
        return weight_grad
    if weight_grad == "fp32":
        return logits  # float64 for float64 inputs
    if weight_grad == "bf16":
        return torch.bfloat16
    raise ValueError(f"weight_grad must be 'fp32', 'bf16' or a tensor to add into, got {weight_grad!r}")


def _constant(tensor: Tensor) -> Tensor:
    """Without a gradient; a copy where it was made under torch.inference_mode(), which no backward pass may read."""
    return tensor.clone() if tensor.is_inference() and torch.is_grad_enabled() else tensor.detach()


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """As autocast treats a linear layer: its dtype, unless the inputs are float64."""
    if under_autocast(hidden.device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(hidden.device.type)
    return hidden.dtype


def _backend(backend: str, device: torch.device, logits: torch.dtype, fields: tuple[str, ...]) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    installed = importlib.util.find_spec("triton") is not None
    if backend in ("triton", "tiled") and not installed:
        raise ValueError(f"backend={backend!r} needs triton, which is not installed; use backend='torch'")
    if backend == "tiled":
        refused = [name for name in fields if name not in SHARED_FIELDS]
        if refused:
            raise ValueError(f"backend='tiled' does not offer {', '.join(refused)}; use backend='triton' or 'auto'")
    if backend == "torch" or logits == torch.float64:
        return "torch"
    if backend == "auto":
        return "triton" if device.type == "cuda" and installed else "torch"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend={backend!r} needs CUDA tensors, got {device}; use backend='auto' or 'torch' (triton's "
            "interpreter, TRITON_INTERPRET=1, runs it on a CPU for tests)"
        )
    return backend
