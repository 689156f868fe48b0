"""The door's functions while something records what is called: written with the operators of `operators`, and plain torch.

torch.compile traces these lines instead of the eager functions' checks and loops; make_fx, torch.export, FakeTensorMode
and selective checkpointing see the operators when they run. What cannot be an operator says so in `refusal`, and the
eager function takes its place: under torch.compile it stands between two graphs.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from minillm.kernels import operators
from minillm.kernels.argument_checks import TOKEN_STATS, check_fields, check_softcap, resolved_head, under_autocast
from minillm.kernels.divergences import DIVERGENCES, FIELDS
from minillm.kernels.head import LMHeadSum
from minillm.kernels.options import LossOptions, declared
from minillm.kernels.sparse_teacher import DEFAULT, TopK
from minillm.kernels.token_stats import TokenStats

_DEFAULTS = {name: option.default for name, (_, option) in declared(LossOptions).items()}


def refusal(options: Mapping[str, Any]) -> str | None:
    """The reason why a call with these options can be no operator; None where it can."""
    into = options["weight_grad"]
    if isinstance(into, Tensor) or (isinstance(into, tuple | list) and any(isinstance(one, Tensor) for one in into)):
        return "weight_grad is a tensor that the backward pass adds to, and an operator has no such side effect"
    if options["process_group"] is not None:
        return "process_group= calls collectives, in a number that depends on the labels"
    return None


def linear_token_stats(
    student_hidden, student_head, teacher_hidden, teacher_head, labels, *, fields=None, **options
) -> TokenStats:
    """linear_token_stats of `token_stats`."""
    default = DEFAULT if isinstance(teacher_hidden, TopK) else TOKEN_STATS
    has_teacher = teacher_hidden is not None
    fields = check_fields(fields, has_teacher=has_teacher, has_labels=labels is not None, default=default)
    arguments = _arguments(student_hidden, student_head, teacher_hidden, teacher_head, labels, fields, options)
    found = operators.statistics(*arguments)
    return TokenStats(dict(zip(fields, found[:-2], strict=True)))


def linear_logprobs(hidden, head, labels, **options) -> Tensor:
    """linear_logprobs of `linear_losses`."""
    arguments = _arguments(hidden, head, None, None, labels, ("student_logprob",), options, "hidden,head")
    return operators.statistics(*arguments)[0]


def linear_cross_entropy(hidden, head, labels, *, reduction="mean", num_items=None, **options) -> Tensor:
    """linear_cross_entropy of `linear_losses`."""
    arguments = _arguments(hidden, head, None, None, labels, ("student_logprob",), options, "hidden,head")
    return _reduced(arguments, -1.0, reduction, num_items)


def linear_divergence(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    *,
    divergence="reverse_kl",
    labels=None,
    reduction="mean",
    num_items=None,
    **options,
) -> Tensor:
    """linear_divergence of `linear_losses`."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    arguments = _arguments(student_hidden, student_head, teacher_hidden, teacher_head, labels, (divergence,), options)
    return _reduced(arguments, 1.0, reduction, num_items)


def _reduced(arguments: operators.Arguments, factor: float, reduction: str, num_items: int | Tensor | None) -> Tensor:
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be one of mean, sum, none, got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items is the divisor of reduction='mean'; it means nothing with {reduction!r}")
    if reduction == "none" or arguments.backend == "tiled":
        values, _, count = operators.statistics(*arguments)
        values = values if factor == 1.0 else factor * values
        if reduction == "none":
            return values
        total = values.sum()
    else:
        total, count = operators.statistic_sum(*arguments, factor)[:2]
    if reduction == "sum":
        return total
    if num_items is None:
        return total / count.clamp(min=1)
    return total / (num_items.reshape(()) if isinstance(num_items, Tensor) else float(num_items))


def linear_objective(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    labels,
    objective: Callable,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    fields: Iterable[str] | None = None,
    coupled: bool = False,
    **options,
) -> tuple[Tensor, dict[str, Tensor]]:
    """linear_objective of `objective`: its objective is traced with what surrounds it, over the statistics of all tokens at
    once, and their gradient computes the logits a second time."""
    stats = linear_token_stats(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, fields=fields, **options
    )
    names = stats.fields
    first = getattr(stats, names[0])
    shape = first.shape
    size = shape if coupled else (math.prod(shape),)
    kept = None if labels is None else (labels != options["ignore_index"]).reshape(size)
    given = {}
    for name, value in (inputs or {}).items():
        value = value.reshape(size)
        given[name] = torch.where(kept, value, torch.zeros_like(value)) if coupled and kept is not None else value
    values = {name: getattr(stats, name).reshape(size) for name in names}
    result = objective(
        TokenStats({name: one if FIELDS[name].differentiable else one.detach() for name, one in values.items()}),
        **given,
    )
    loss, metrics = result if isinstance(result, tuple) else (result, {})
    dtype = next((value.dtype for value in values.values() if value.is_floating_point()), torch.float32)
    if not coupled and loss.shape != size:
        raise ValueError(f"objective must return the loss of each token, a tensor of shape {tuple(size)}")
    total = _sum_over_kept(loss.to(dtype), kept, size)
    return total, {name: _sum_over_kept(value.detach().to(dtype), kept, size) for name, value in metrics.items()}


def _sum_over_kept(value: Tensor, kept: Tensor | None, size: tuple[int, ...]) -> Tensor:
    """Of tokens over those that are kept; of anything else where any is."""
    if kept is None:
        return value.sum()
    return torch.where(kept if value.shape == size else kept.any(), value, torch.zeros_like(value)).sum()


def _arguments(
    student_hidden,
    student_head,
    teacher_hidden,
    teacher_head,
    labels,
    fields,
    options,
    names="student_hidden,student_head",
) -> operators.Arguments:
    options = {**_DEFAULTS, **options}
    student = _model(student_hidden, student_head, names.split(",")[1])
    top_k = [teacher_hidden.ids, teacher_hidden.logprobs] if isinstance(teacher_hidden, TopK) else []
    if top_k and teacher_head is not None:
        raise ValueError("teacher_head must be None where teacher_hidden is a TopK: there is nothing to project")
    if not top_k and (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("teacher_hidden and teacher_head go together: pass both, or None for both")
    with torch.no_grad():
        teacher = [] if teacher_head is None else _model(teacher_hidden, teacher_head, "teacher_head")
    graded = torch.is_grad_enabled()
    needs = [
        graded and tensor is not None and tensor.requires_grad
        for hidden, head in student
        for tensor in (hidden, head.weight, head.bias)
    ]
    device = student[0][0].device
    into = options["weight_grad"]
    return operators.Arguments(
        **_of_model("student", student, names.split(",")[1]),
        **_of_model("teacher", teacher, "teacher_head"),
        top_k=top_k,
        top_k_temperature=float(teacher_hidden.temperature) if top_k else 1.0,
        labels=labels,
        fields=",".join(fields),
        names=names,
        autocast=torch.get_autocast_dtype(device.type) if under_autocast(device) else None,
        needs=needs,
        weight_grad=into if isinstance(into, str) else ",".join(into),
        **{
            name: options[name]
            for name in ("ignore_index", "temperature", "vocab_size", "kept", "backend", "chunk_bytes")
        },
        **{name: options[name] for name in ("beta", "alpha", "interpolation")},
    )


def _model(hidden, head, name: str) -> list[tuple[Tensor, Any]]:
    """Hidden states and LMHead of every head."""
    if not isinstance(head, LMHeadSum):
        return [(hidden, resolved_head(head, name, hidden.dtype))]
    if not isinstance(hidden, tuple | list) or len(hidden) != len(head.heads):
        raise ValueError(f"the hidden states of {name} must be a tuple of {len(head.heads)}, one for each of its heads")
    return [
        (states, resolved_head(part, f"{name}.heads[{index}]", states.dtype))
        for index, (states, part) in enumerate(zip(hidden, head.heads, strict=True))
    ]


def _of_model(who: str, parts: list[tuple[Tensor, Any]], name: str) -> dict[str, list]:
    return {
        f"{who}_hidden": [hidden for hidden, _ in parts],
        f"{who}_weight": [head.weight for _, head in parts],
        f"{who}_bias": [head.bias for _, head in parts if head.bias is not None],
        f"{who}_has_bias": [head.bias is not None for _, head in parts],
        f"{who}_scale": [float(head.logit_scale) for _, head in parts],
        f"{who}_softcap": [check_softcap(head, name) or 0.0 for _, head in parts],
    }
