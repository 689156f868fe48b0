"""Checks of every argument that a caller passes: errors name it and say what to do."""

import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minillm.kernels.divergences import FIELDS
from minillm.kernels.head import LMHead, LMHeadSum
from minillm.kernels.model_heads import linear_parameters
from minillm.kernels.sharded_heads import is_dtensor, is_lost_piece, is_sharded, whole

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


class Model(NamedTuple):
    """A model's checked arguments: its head, or those whose logits it adds up."""

    hidden: tuple[Tensor, ...]  # (..., H_i) each
    heads: tuple[LMHead, ...]
    names: tuple[str, ...]  # of the heads

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions."""
        return self.hidden[0].shape[:-1]

    @property
    def device(self) -> torch.device:
        return self.hidden[0].device

    @property
    def wide(self) -> bool:
        return any(hidden.dtype == torch.float64 for hidden in self.hidden)


def check_model(hidden: Any, head: Any, name: str, head_name: str) -> Model:
    """The model of a head or a sum of heads, with hidden states that fit."""
    if not isinstance(head, LMHeadSum):
        if isinstance(hidden, tuple):
            raise ValueError(
                f"{name} is a tuple, but {head_name} is one head; pass LMHead.sum_of(...) with a head for each of its "
                f"{len(hidden)} hidden states, or one tensor"
            )
        head = check_head(head, head_name, _dtype(hidden))
        check_hidden(hidden, head, name, head_name)
        return Model((hidden,), (head,), (head_name,))
    count = len(head.heads)
    if not isinstance(hidden, tuple | list) or len(hidden) != count:
        got = f"{len(hidden)} of them" if isinstance(hidden, tuple | list) else f"a {type(hidden).__name__}"
        raise ValueError(
            f"{name} must be a tuple of {count} hidden states, one for each head of {head_name}, got {got}"
        )
    names = tuple(f"{head_name}.heads[{index}]" for index in range(count))
    heads = tuple(
        check_head(part, part_name, _dtype(states))
        for part, part_name, states in zip(head.heads, names, hidden, strict=True)
    )
    for index, (states, part, part_name) in enumerate(zip(hidden, heads, names, strict=True)):
        check_hidden(states, part, f"{name}[{index}]", part_name)
        check_same_tokens(states, hidden[0], f"{name}[{index}]", f"{name}[0]")
    return Model(tuple(hidden), heads, names)


def _dtype(hidden: Any) -> torch.dtype | None:
    return hidden.dtype if isinstance(hidden, Tensor) else None


def check_same_tokens(hidden: Tensor, other: Tensor, name: str, other_name: str) -> None:
    if hidden.shape[:-1] != other.shape[:-1]:
        raise ValueError(
            f"{name} has leading dimensions {tuple(hidden.shape[:-1])}, {other_name} {tuple(other.shape[:-1])}; row i of "
            "both must be the same token"
        )
    if hidden.device != other.device:
        raise ValueError(f"{name} is on {hidden.device}, {other_name} on {other.device}; move them to one device")


def resolved_head(head: Any, name: str, dtype: torch.dtype | None = None) -> LMHead:
    """The LMHead of what a caller may pass for one head, with plain tensors: a weight, a linear layer as PEFT's adapters
    leave it, a head whose weights are sharded, which are gathered here. `dtype`: of the hidden states."""
    if isinstance(head, nn.Module):
        head = LMHead(*linear_parameters(head, name))
    if isinstance(head, Tensor):
        head = LMHead(head)
    if not isinstance(head, LMHead):
        raise ValueError(
            f"{name} is a {type(head).__name__}, not an LMHead, a weight tensor or a linear layer; pass LMHead.of(model), or "
            "LMHead(module.weight, module.bias)"
        )
    for what, tensor in (("weight", head.weight), ("bias", head.bias)):
        if tensor is None and what == "bias":
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{name}.{what} is a {type(tensor).__name__}, not a tensor; pass the module itself, LMHead.of(model), or the "
                "weight of a merged layer"
            )
        if is_lost_piece(tensor):
            raise ValueError(
                f"{name}.{what} is a ZeRO-3 shard (0 of {tensor.ds_numel} elements are here) that is no parameter of "
                "DeepSpeed any more; pass the parameter itself"
            )
    if not (is_sharded(head.weight) or is_sharded(head.bias)):
        return head
    wide = torch.float64 in (dtype, head.weight.dtype)
    weight, bias = (
        None if tensor is None else whole(tensor, f"{name}.{what}", None if wide else dtype)
        for what, tensor in (("weight", head.weight), ("bias", head.bias))
    )
    return replace(head, weight=weight, bias=bias)


def check_head(head: Any, name: str, dtype: torch.dtype | None) -> LMHead:
    head = resolved_head(head, name, dtype)
    if head.weight.dim() != 2 or head.weight.numel() == 0:
        raise ValueError(f"{name}.weight must be (V, H) and not empty, got {tuple(head.weight.shape)}")
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise ValueError(f"{name}.bias has shape {tuple(head.bias.shape)}, expected ({head.weight.shape[0]},)")
    return head


def check_hidden(hidden: Any, head: LMHead, name: str, head_name: str) -> None:
    if not isinstance(hidden, Tensor) or not hidden.is_floating_point() or hidden.dim() < 1:
        got = f"{tuple(hidden.shape)} {hidden.dtype}" if isinstance(hidden, Tensor) else type(hidden).__name__
        raise ValueError(f"{name} must be a floating-point tensor (..., H), got {got}")
    if is_dtensor(hidden):
        raise ValueError(f"{name} is a DTensor; pass this rank's tokens, {name}.to_local()")
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
        castable = under_autocast(hidden.device) and torch.float64 not in (tensor.dtype, hidden.dtype)
        if not tensor.is_floating_point() or (tensor.dtype != hidden.dtype and not castable):
            raise ValueError(
                f"{head_name}.{what} is {tensor.dtype}, but {name} is {hidden.dtype}; convert one of them, or use "
                "autocast"
            )


def check_vocab_size(student: Model, teacher: Model | None, vocab_size: int | None) -> int:
    sizes = {}
    for model in (student,) if teacher is None else (student, teacher):
        sizes |= {name: head.weight.shape[0] for name, head in zip(model.names, model.heads, strict=True)}
    if vocab_size is None:
        shared = min(sizes.values())
        if any(size != shared for size in sizes.values()):
            raise ValueError(
                f"{' and '.join(f'{name} has {size} rows' for name, size in sizes.items())}; if their first {shared} "
                f"ids mean the same tokens (the rest is padding), pass vocab_size={shared}"
            )
        return shared
    if not is_int(vocab_size) or not 1 <= vocab_size <= min(sizes.values()):
        raise ValueError(
            f"vocab_size={vocab_size!r} must be an integer between 1 and {min(sizes.values())}, the smaller head"
        )
    return int(vocab_size)


def check_vocabulary_parallel(student: Model, teacher: Model | None, top_k: Any, options: Mapping[str, Any]) -> None:
    """Refuse what does not go with a head that is cut by vocabulary. Raises ValueError."""
    if top_k is not None:
        raise ValueError(
            "process_group does not go with a TopK as teacher_hidden; pass the teacher's rows of this rank"
        )
    if any(model is not None and len(model.heads) > 1 for model in (student, teacher)):
        raise ValueError("process_group does not go with LMHead.sum_of; pass one head, this rank's rows of it")
    if options["backend"] not in ("auto", "torch"):
        raise ValueError(f"process_group goes with backend='auto' or 'torch', got {options['backend']!r}")
    if options["vocab_size"] is not None and not is_int(options["vocab_size"]):
        raise ValueError(f"vocab_size={options['vocab_size']!r} must be an integer")


def check_fields(
    fields: str | Iterable[str] | None,
    *,
    has_teacher: bool,
    has_labels: bool,
    default: tuple[str, ...] = TOKEN_STATS,  # what None means, less what needs a teacher or labels that are not there
) -> tuple[str, ...]:
    def available(name: str) -> bool:
        return (has_teacher or not FIELDS[name].teacher) and (has_labels or not FIELDS[name].labels)

    if fields is None:
        return tuple(name for name in default if available(name))
    if not isinstance(fields, Iterable):
        raise ValueError(f"fields must be names of statistics, got a {type(fields).__name__}")
    fields = (fields,) if isinstance(fields, str) else tuple(fields)
    if not fields:
        raise ValueError(f"fields names no statistic; there are {', '.join(FIELDS)}")
    for name in fields:
        if not isinstance(name, str) or name not in FIELDS:
            raise ValueError(f"fields: unknown statistic {name!r}; there are {', '.join(FIELDS)}")
        if FIELDS[name].teacher and not has_teacher:
            raise ValueError(f"fields: {name} needs the teacher; pass teacher_hidden and teacher_head")
        if FIELDS[name].labels and not has_labels:
            raise ValueError(f"fields: {name} needs labels, which are None")
    return tuple(name for name in FIELDS if name in fields)


def check_labels(labels: Any, shape: torch.Size, device: torch.device) -> Tensor:
    dtype = getattr(labels, "dtype", None)
    if not isinstance(labels, Tensor) or dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        raise ValueError(f"labels must be an integer tensor, got {dtype or type(labels).__name__}")
    if labels.shape != shape:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, expected {tuple(shape)}, a label for each hidden state"
        )
    if labels.device != device:
        raise ValueError(f"labels is on {labels.device}, the hidden states on {device}")
    return labels.to(torch.int64)


def check_ignore_index(value: Any) -> int:
    if not is_int(value):
        raise ValueError(f"ignore_index must be an integer, the label of tokens to leave out, got {value!r}")
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"ignore_index must fit into 64 bits, as labels do, got {value}")
    return int(value)


def check_kept(value: Any, rows: int) -> int | None:
    if value is None:
        return None
    if not is_int(value) or not 0 <= value <= rows:
        raise ValueError(f"kept must be an integer from 0 to {rows}, the number of tokens that count, got {value!r}")
    return int(value)


def check_num_items(value: Any) -> None:
    """A positive finite number, or a tensor of one, whose value is looked at where it costs no synchronisation."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"num_items must be one number, got a tensor of shape {tuple(value.shape)} {value.dtype}")
        if value.device.type != "cpu":
            return
        value = value.item()
    elif not is_real(value):
        raise ValueError(f"num_items must be a number or a tensor of one, got a {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"num_items must be positive and finite, got {value}")


def check_inputs(inputs: Any) -> dict[str, Any]:
    if inputs is None:
        return {}
    if not isinstance(inputs, Mapping):
        raise ValueError(f"inputs must be a mapping of names to tensors, got a {type(inputs).__name__}")
    return dict(inputs)


def is_int(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_positive(value: float, name: str) -> float:
    if not is_real(value) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")
    return float(value)


def check_softcap(head: LMHead, name: str) -> float | None:
    return None if head.softcap is None else check_positive(head.softcap, f"{name}.softcap")


def check_weight(value: float, name: str) -> float:
    if not is_real(value) or not 0 < value < 1:
        raise ValueError(f"{name} must lie strictly between 0 and 1, got {value!r}; the end points are the plain KLs")
    return float(value)


def check_interpolation(value: float) -> float:
    if not is_real(value) or not 0 <= value <= 1:
        raise ValueError(
            f"interpolation must lie between 0 (the student alone) and 1 (the teacher alone), got {value!r}"
        )
    return float(value)


def under_autocast(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
