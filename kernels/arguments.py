"""From the arguments that every entry point shares to a Problem and its Tensors."""

import importlib.util
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minillm.kernels.argument_checks import (
    TOKEN_STATS,
    Model,
    check_fields,
    check_ignore_index,
    check_interpolation,
    check_kept,
    check_labels,
    check_model,
    check_positive,
    check_same_tokens,
    check_softcap,
    check_vocab_size,
    check_vocabulary_parallel,
    check_weight,
    is_int,
    under_autocast,
)
from minillm.kernels.chunks import TILE_BYTES, TILE_IDS, chunk_rows, keep_rows
from minillm.kernels.divergences import RowSpec
from minillm.kernels.head import Head, Hidden
from minillm.kernels.model_logits import HeadSpec, HeadTensors, buffers
from minillm.kernels.problem import Problem, Tensors
from minillm.kernels.share_sums import SHARED_FIELDS
from minillm.kernels.sparse_teacher import (
    DEFAULT,
    OUTCOME_BUFFERS,
    RowChecks,
    SparseRows,
    TopK,
    check_sayable,
    check_top_k,
)
from minillm.kernels.vocabulary_parallel import Replicated, VocabularyShard

BACKENDS = ("auto", "torch", "triton", "tiled")


def prepare(
    student_hidden: Hidden,  # (..., H_s)
    student_head: Head,
    teacher_hidden: Hidden | TopK | None,  # (..., H_t)
    teacher_head: Head | None,  # None with a TopK
    labels: Tensor | None,  # (...)
    options: Mapping[str, Any],  # all that an entry point declares
    *,
    fields: str | Iterable[str] | None,
    names: tuple[str, str] = ("student_hidden", "student_head"),
    look: bool = True,
) -> tuple[Problem, Tensors]:
    """Check everything and flatten. Raises ValueError naming the argument.

    Without `look` no number is read, as none can be where a compiler asks for shapes alone: then no token is kept.
    """
    student = check_model(student_hidden, student_head, *names)
    shape, device = student.shape, student.device
    temperature = check_positive(options["temperature"], "temperature")
    top_k = teacher_hidden if isinstance(teacher_hidden, TopK) else None
    if top_k is None and (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head go together: pass both, or None for both")
    teacher = None
    if top_k is None and teacher_head is not None:
        teacher = check_model(teacher_hidden, teacher_head, "teacher_hidden", "teacher_head")
        check_same_tokens(teacher.hidden[0], student.hidden[0], "teacher_hidden", names[0])
    group = options.get("process_group")
    if group is None:
        shard, size = None, check_vocab_size(student, teacher, options["vocab_size"])
        columns = size
    else:
        check_vocabulary_parallel(student, teacher, top_k, options)
        rows = check_vocab_size(student, teacher, None)
        shard = VocabularyShard.of(group, rows, options["vocab_size"], math.prod(shape), device)
        size, columns = shard.total, shard.size
        student = student._replace(hidden=tuple(Replicated.apply(hidden, group) for hidden in student.hidden))
    if top_k is not None:
        check_top_k(top_k, teacher_head, shape, device, size, temperature)
    fields = check_fields(
        fields,
        has_teacher=teacher_hidden is not None,
        has_labels=labels is not None,
        default=TOKEN_STATS if top_k is None else DEFAULT,
    )
    if top_k is not None:
        check_sayable(fields)
    spec = RowSpec(
        fields=fields,
        temperature=temperature,
        **_transform("student", student),
        **_transform("teacher", teacher),
        **{name: check_weight(options[name], name) for name in ("beta", "alpha") if name in options},
        **{name: check_interpolation(options[name]) for name in ("interpolation",) if name in options},
    )
    if not spec.needs("teacher"):
        teacher = top_k = None
    kept, ignore_index = check_kept(options["kept"], math.prod(shape)), check_ignore_index(options["ignore_index"])
    vouched = kept is not None and device.type != "cpu"  # then nothing looks at labels and ids
    if labels is not None:
        labels = check_labels(labels, shape, device).reshape(-1).contiguous()
    sparse = checks = None
    if top_k is not None:
        sparse = SparseRows(_rows(_constant(top_k.ids)), _rows(_constant(top_k.logprobs)))
        checks = RowChecks(sparse, size, labels if "teacher_logprob" in fields else None)
    if not look:
        index, kept = None, 0
    elif labels is not None:
        index, kept = keep_rows(labels, ignore_index, size, kept, checks)
    else:
        if kept not in (None, shape.numel()):
            raise ValueError(f"kept is {kept}, but without labels all {shape.numel()} tokens count")
        index, kept = None, shape.numel()
        if checks is not None and not vouched:
            checks.report(torch.stack(checks.counts(None)).tolist(), kept)
    if sparse is not None and vouched:
        sparse = sparse._replace(ids=sparse.ids.clamp(0, size - 1))
    if not spec.needs("labels"):
        labels = None
    elif vouched:
        labels = labels.clamp(0, size - 1)
    if shard is not None:
        labels = shard.local(labels)
    wide = student.wide or (teacher is not None and teacher.wide)
    logits = torch.float64 if wide else torch.float32
    chunk_bytes = options["chunk_bytes"]
    if chunk_bytes is not None and not (is_int(chunk_bytes) and chunk_bytes > 0):
        raise ValueError(f"chunk_bytes must be a positive integer, got {chunk_bytes!r}")
    backend = _backend(
        "torch" if shard is not None else options["backend"],
        device,
        logits,
        fields,
        summed=_summed(student) or _summed(teacher),
        sparse=sparse is not None,
    )
    student_specs = _specs(student, graded=torch.is_grad_enabled())
    teacher_specs = None if teacher is None else _specs(teacher, graded=False)
    if backend == "tiled":
        ids, chunk_bytes = min(size, TILE_IDS), chunk_bytes or TILE_BYTES
    elif shard is not None:
        ids = shard.largest  # all ranks must make the same chunks
    else:
        ids = size if sparse is None else size + OUTCOME_BUFFERS * (sparse.ids.shape[1] + 1)
    problem = Problem(
        spec=spec,
        shape=shape,
        kept=kept,
        vocab_size=columns,
        chunk=1
        if not look
        else chunk_rows(
            kept,
            ids,
            models=buffers(student_specs) + (0 if teacher is None else buffers(teacher_specs)),
            itemsize=logits.itemsize,
            device=device,
            chunk_bytes=chunk_bytes,
        ),
        student=student_specs,
        teacher=teacher_specs,
        logits=logits,
        backend=backend,
        sparse_teacher=sparse is not None,
        shard=shard,
    )
    tensors = Tensors(
        student=tuple(
            HeadTensors(_rows(hidden), head.weight, head.bias)
            for hidden, head in zip(student.hidden, student.heads, strict=True)
        ),
        teacher=sparse
        if teacher is None
        else tuple(
            HeadTensors(
                _rows(_constant(hidden)),
                _constant(head.weight)[:columns],
                None if head.bias is None else _constant(head.bias)[:columns],
            )
            for hidden, head in zip(teacher.hidden, teacher.heads, strict=True)
        ),
        labels=None if labels is None else _constant(labels),
        kept=index,
    )
    return problem, tensors


def _rows(hidden: Tensor) -> Tensor:  # (..., H) -> (N, H)
    return hidden.reshape(-1, hidden.shape[-1])


def _summed(model: Model | None) -> bool:
    return model is not None and len(model.heads) > 1


def _scaling(model: Model) -> list[tuple[float, float | None]]:
    """Scale and softcap of every head."""
    return [
        (check_positive(head.logit_scale, f"{name}.logit_scale"), check_softcap(head, name))
        for head, name in zip(model.heads, model.names, strict=True)
    ]


def _transform(who: str, model: Model | None) -> dict[str, float | None]:
    """The scale and softcap that the row operations apply: a single head's."""
    if model is None or _summed(model):
        return {}
    ((scale, softcap),) = _scaling(model)
    return {f"{who}_scale": scale, f"{who}_softcap": softcap}


def _specs(model: Model, *, graded: bool) -> tuple[HeadSpec, ...]:
    if not _summed(model):
        return (HeadSpec(_compute_dtype(model.hidden[0])),)
    return tuple(
        HeadSpec(
            _compute_dtype(hidden),
            scale,
            softcap,
            graded=graded and any(t is not None and t.requires_grad for t in (hidden, head.weight, head.bias)),
        )
        for hidden, head, (scale, softcap) in zip(model.hidden, model.heads, _scaling(model), strict=True)
    )


def accumulation(weight_grad: Any, tensors: Tensors, logits: torch.dtype) -> tuple[torch.dtype | Tensor, ...]:
    """The meaning of `weight_grad` for the weight of every head of the student. Raises ValueError naming it."""
    heads = tensors.student
    if isinstance(weight_grad, tuple | list):
        if len(weight_grad) != len(heads) or len(heads) == 1:
            raise ValueError(
                f"weight_grad has {len(weight_grad)} entries, but the student's head is "
                + (f"a sum of {len(heads)}" if len(heads) > 1 else "one: pass 'fp32', 'bf16' or a tensor to add into")
            )
        return tuple(_accumulation(one, head.weight, logits) for one, head in zip(weight_grad, heads, strict=True))
    if isinstance(weight_grad, Tensor) and len(heads) > 1:
        raise ValueError(
            f"weight_grad is a tensor, but the student's head is a sum of {len(heads)}: pass a tuple with 'fp32', 'bf16' "
            "or a tensor for each"
        )
    return tuple(_accumulation(weight_grad, head.weight, logits) for head in heads)


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


def _backend(
    backend: str, device: torch.device, logits: torch.dtype, fields: tuple[str, ...], *, summed: bool, sparse: bool
) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    installed = importlib.util.find_spec("triton") is not None
    if backend in ("triton", "tiled") and not installed:
        raise ValueError(f"backend={backend!r} needs triton, which is not installed; use backend='torch'")
    if backend == "tiled":
        if sparse:
            raise ValueError("backend='tiled' does not offer a TopK as teacher_hidden; use backend='triton' or 'auto'")
        refused = [name for name in fields if name not in SHARED_FIELDS]
        if refused:
            raise ValueError(f"backend='tiled' does not offer {', '.join(refused)}; use backend='triton' or 'auto'")
        if summed:
            raise ValueError("backend='tiled' does not offer LMHead.sum_of; use backend='triton' or 'auto'")
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
