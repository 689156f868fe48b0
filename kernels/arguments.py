"""The arguments that every entry point shares: checked once, with errors that name them and say what to do."""

import importlib.util
import numbers
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from minillm.kernels.chunks import TILE_BYTES, TILE_IDS, chunk_rows, keep_rows
from minillm.kernels.divergences import FIELDS, RowSpec
from minillm.kernels.head import LMHead
from minillm.kernels.problem import Problem, Tensors
from minillm.kernels.share_sums import SHARED_FIELDS

BACKENDS = ("auto", "torch", "triton", "tiled")
TOKEN_STATS = (
    "student_logprob",
    "teacher_logprob",
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "teacher_entropy",
    "student_argmax",
    "teacher_argmax",
)


def prepare(
    student_hidden: Tensor,  # (..., H_s)
    student_head: LMHead | Tensor,
    teacher_hidden: Tensor | None,  # (..., H_t)
    teacher_head: LMHead | Tensor | None,
    labels: Tensor | None,  # (...)
    *,
    fields: str | Iterable[str] | None,
    beta: float,
    alpha: float,
    ignore_index: int,
    temperature: float,
    vocab_size: int | None,
    kept: int | None,
    backend: str,
    chunk_bytes: int | None,
    names: tuple[str, str] = ("student_hidden", "student_head"),
) -> tuple[Problem, Tensors]:
    """Check everything and flatten. Raises ValueError naming the argument."""
    student = _head(student_head, names[1])
    _check_hidden(student_hidden, student, *names)
    shape = student_hidden.shape[:-1]
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head go together: pass both, or None for both")
    teacher = None if teacher_head is None else _head(teacher_head, "teacher_head")
    if teacher is not None:
        _check_hidden(teacher_hidden, teacher, "teacher_hidden", "teacher_head")
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
    size = _vocab_size(student, teacher, vocab_size, names[1])
    fields = _fields(fields, has_teacher=teacher is not None, has_labels=labels is not None)
    spec = RowSpec(
        fields=fields,
        temperature=_positive(temperature, "temperature"),
        student_scale=_positive(student.logit_scale, f"{names[1]}.logit_scale"),
        student_softcap=_softcap(student, names[1]),
        teacher_scale=1.0 if teacher is None else _positive(teacher.logit_scale, "teacher_head.logit_scale"),
        teacher_softcap=None if teacher is None else _softcap(teacher, "teacher_head"),
        beta=_weight(beta, "beta"),
        alpha=_weight(alpha, "alpha"),
    )
    if not spec.needs("teacher"):
        teacher_hidden = teacher = None
    if labels is not None:
        labels = _check_labels(labels, shape, student_hidden.device).reshape(-1).contiguous()
        vouched = kept is not None and labels.device.type != "cpu"  # then nothing looked at them
        index, kept = keep_rows(labels, ignore_index, size, kept)
    else:
        index, kept, vouched = None, shape.numel(), False
    if not spec.needs("labels"):
        labels = None
    elif vouched:
        labels = labels.clamp(0, size - 1)
    wide = torch.float64 in (student_hidden.dtype, None if teacher is None else teacher_hidden.dtype)
    logits = torch.float64 if wide else torch.float32
    device = student_hidden.device
    if chunk_bytes is not None and not (_is_int(chunk_bytes) and chunk_bytes > 0):
        raise ValueError(f"chunk_bytes must be a positive integer, got {chunk_bytes!r}")
    backend = _backend(backend, device, logits, fields)
    if backend == "tiled":
        ids, chunk_bytes = min(size, TILE_IDS), chunk_bytes or TILE_BYTES
    else:
        ids = size
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
        student_compute=_compute_dtype(student_hidden),
        teacher_compute=None if teacher is None else _compute_dtype(teacher_hidden),
        logits=logits,
        backend=backend,
    )
    tensors = Tensors(
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student.weight,
        student.bias,
        None if teacher is None else _constant(teacher_hidden).reshape(-1, teacher_hidden.shape[-1]),
        None if teacher is None else _constant(teacher.weight)[:size],
        None if teacher is None or teacher.bias is None else _constant(teacher.bias)[:size],
        None if labels is None else _constant(labels),
        index,
    )
    return problem, tensors


def accumulation(weight_grad: Any, weight: Tensor, logits: torch.dtype) -> torch.dtype | Tensor:
    """What `weight_grad` means for this weight. Raises ValueError naming it."""
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


def _head(head: Any, name: str) -> LMHead:
    if isinstance(head, Tensor):
        head = LMHead(head)
    if not isinstance(head, LMHead):
        wrapped = hasattr(head, "base_layer") or hasattr(head, "lora_A")
        raise ValueError(
            f"{name} is a {type(head).__name__}, not an LMHead or a weight tensor; "
            + (
                "a LoRA-wrapped head would train on the base weight alone: merge the adapter, or leave lm_head out of "
                "its target modules"
                if wrapped
                else "pass LMHead(module.weight, module.bias)"
            )
        )
    for what, tensor in (("weight", head.weight), ("bias", head.bias)):
        if tensor is None and what == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name}.{what} is a {type(tensor).__name__}, not a tensor; a LoRA-wrapped head must be merged first"
            )
        if hasattr(tensor, "device_mesh"):
            raise ValueError(
                f"{name}.{what} is a DTensor (sharded); pass {what}.full_tensor(), or call the loss inside the "
                "forward of the module that owns the head, where FSDP has gathered it"
            )
        if getattr(tensor, "ds_numel", tensor.numel()) != tensor.numel():
            raise ValueError(
                f"{name}.{what} is a ZeRO-3 shard (0 of {tensor.ds_numel} elements are here); call the loss inside "
                "the forward of the engine's module, or inside deepspeed.zero.GatheredParameters together with "
                "backward"
            )
    if head.weight.dim() != 2 or head.weight.numel() == 0:
        raise ValueError(f"{name}.weight must be (V, H) and not empty, got {tuple(head.weight.shape)}")
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError(f"{name}.bias has shape {tuple(head.bias.shape)}, expected ({head.weight.shape[0]},)")
    return head


def _check_hidden(hidden: Any, head: LMHead, name: str, head_name: str) -> None:
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.dim() < 1:
        got = f"{tuple(hidden.shape)} {hidden.dtype}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"{name} must be a floating-point tensor (..., H), got {got}")
    if hidden.shape[-1] != head.weight.shape[1]:
        raise ValueError(
            f"{name} has hidden size {hidden.shape[-1]}, but {head_name}.weight is (V={head.weight.shape[0]}, "
            f"H={head.weight.shape[1]})"
        )
    for what, tensor in (("weight", head.weight), ("bias", head.bias)):
        if tensor is None:
            continue
        if tensor.device != hidden.device:
            raise ValueError(f"{head_name}.{what} is on {tensor.device}, {name} on {hidden.device}")
        castable = _autocast(hidden.device) and torch.float64 not in (tensor.dtype, hidden.dtype)
        if not tensor.is_floating_point() or (tensor.dtype != hidden.dtype and not castable):
            raise ValueError(
                f"{head_name}.{what} is {tensor.dtype}, but {name} is {hidden.dtype}; convert one of them, or use "
                "autocast"
            )


def _vocab_size(student: LMHead, teacher: LMHead | None, vocab_size: int | None, student_name: str) -> int:
    sizes = {student_name: student.weight.shape[0]}
    if teacher is not None:
        sizes["teacher_head"] = teacher.weight.shape[0]
    if vocab_size is None:
        if len(set(sizes.values())) > 1:
            shared = min(sizes.values())
            raise ValueError(
                f"{' and '.join(f'{name} has {size} rows' for name, size in sizes.items())}; if their first {shared} "
                f"ids mean the same tokens (the rest is padding), pass vocab_size={shared}"
            )
        return student.weight.shape[0]
    if not _is_int(vocab_size) or not 1 <= vocab_size <= min(sizes.values()):
        raise ValueError(
            f"vocab_size={vocab_size!r} must be an integer between 1 and {min(sizes.values())}, the smaller head"
        )
    return int(vocab_size)


def _fields(fields: str | Iterable[str] | None, *, has_teacher: bool, has_labels: bool) -> tuple[str, ...]:
    def available(name: str) -> bool:
        return (has_teacher or not FIELDS[name].teacher) and (has_labels or not FIELDS[name].labels)

    if fields is None:
        return tuple(name for name in TOKEN_STATS if available(name))
    fields = (fields,) if isinstance(fields, str) else tuple(fields)
    if not fields:
        raise ValueError(f"fields names no statistic; there are {', '.join(FIELDS)}")
    for name in fields:
        if name not in FIELDS:
            raise ValueError(f"fields: unknown statistic {name!r}; there are {', '.join(FIELDS)}")
        if FIELDS[name].teacher and not has_teacher:
            raise ValueError(f"fields: {name} needs the teacher; pass teacher_hidden and teacher_head")
        if FIELDS[name].labels and not has_labels:
            raise ValueError(f"fields: {name} needs labels, which are None")
    return tuple(name for name in FIELDS if name in fields)


def _check_labels(labels: Any, shape: torch.Size, device: torch.device) -> Tensor:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype in (torch.bool, torch.complex64):
        raise ValueError(f"labels must be an integer tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, expected {tuple(shape)}, a label for each hidden state"
        )
    if labels.device != device:
        raise ValueError(f"labels is on {labels.device}, the hidden states on {device}")
    return labels.to(torch.int64)


def _is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _positive(value: float, name: str) -> float:
    if not _is_real(value) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


def _softcap(head: LMHead, name: str) -> float | None:
    return None if head.softcap is None else _positive(head.softcap, f"{name}.softcap")


def _weight(value: float, name: str) -> float:
    if not _is_real(value) or not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}; the end points are the plain KLs")
    return float(value)


def _autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """As autocast treats a linear layer: its dtype, unless the inputs are float64."""
    if _autocast(hidden.device) and hidden.dtype != torch.float64:
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
