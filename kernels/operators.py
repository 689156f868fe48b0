"""The losses as operators of torch.library, for what records or replaces operators: torch.compile, torch.export, make_fx,
selective checkpointing, FakeTensorMode.

There are three, all without side effects: `statistics`, its gradient, and `statistic_sum`, the sum over tokens of one statistic with
the gradient that the forward pass computes. Each does what the eager function does, checks and the one host
synchronisation included, so that numbers are the same to the last bit; a compiler sees one opaque node. Plain eager
calls do not come here: `traced` is the way.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.kernels.arguments import accumulation, prepare
from minillm.kernels.divergences import FIELDS
from minillm.kernels.head import LMHead, LMHeadSum
from minillm.kernels.objective import Statistic, sum_and_gradients
from minillm.kernels.problem import Problem, Tensors
from minillm.kernels.recompute import compute_gradients, compute_statistics
from minillm.kernels.sparse_teacher import TopK

# The statistics that a gradient may read besides the fields, of any backend and teacher.
BESIDES = (
    *("student_max", "student_log_sum", "teacher_max", "teacher_log_sum", "interpolated_log_sum"),
    *("mean_u_jsd", "mean_u_skew_forward_kl", "mean_u_skew_reverse_kl"),
    *("outcome_entropy", "tail_max", "tail_log_sum", "tail_entropy"),
)


class Arguments(NamedTuple):
    """The arguments of a loss as an operator takes them: heads taken apart, nothing but tensors, numbers and text."""

    student_hidden: list[Tensor]  # (..., H_i) each
    student_weight: list[Tensor]  # (V_i, H_i) each
    student_bias: list[Tensor]  # (V_i,) of the heads that have one
    student_has_bias: list[bool]
    student_scale: list[float]
    student_softcap: list[float]  # 0: none
    teacher_hidden: list[Tensor]  # none without a teacher, and with a TopK
    teacher_weight: list[Tensor]
    teacher_bias: list[Tensor]
    teacher_has_bias: list[bool]
    teacher_scale: list[float]
    teacher_softcap: list[float]
    top_k: list[Tensor]  # ids and log-probabilities, or none
    top_k_temperature: float
    labels: Tensor | None  # (...)
    fields: str  # separated by commas, as everything that is text
    names: str  # of the student's arguments, in errors
    ignore_index: int
    temperature: float
    vocab_size: int | None
    kept: int | None
    backend: str
    chunk_bytes: int | None
    beta: float
    alpha: float
    interpolation: float
    autocast: torch.dtype | None  # of the caller, which an operator does not see otherwise
    needs: list[bool]  # gradients of hidden states, weight and bias, of every head of the student
    weight_grad: str

    @property
    def leaves(self) -> list[Tensor | None]:
        """Hidden states, weight and bias of every head of the student."""
        biases = iter(self.student_bias)
        return [
            tensor
            for hidden, weight, biased in zip(
                self.student_hidden, self.student_weight, self.student_has_bias, strict=True
            )
            for tensor in (hidden, weight, next(biases) if biased else None)
        ]

    @property
    def needed(self) -> list[Tensor]:
        """The leaves whose gradient is needed."""
        return [leaf for leaf, needed in zip(self.leaves, self.needs, strict=True) if needed]

    def prepare(self, *, look: bool = True) -> tuple[Problem, Tensors]:
        """As the eager functions prepare them; `look`: whether labels and ids may be read."""
        leaves = [
            None if leaf is None else leaf.detach().requires_grad_(needed)
            for leaf, needed in zip(self.leaves, self.needs, strict=True)
        ]
        student = [leaves[start : start + 3] for start in range(0, len(leaves), 3)]
        biases = iter(self.teacher_bias)
        teacher = [
            (hidden, weight, next(biases) if biased else None)
            for hidden, weight, biased in zip(
                self.teacher_hidden, self.teacher_weight, self.teacher_has_bias, strict=True
            )
        ]
        teacher_hidden, teacher_head = _model(teacher, self.teacher_scale, self.teacher_softcap)
        if self.top_k:
            teacher_hidden = TopK(*self.top_k, temperature=self.top_k_temperature)
        device = self.student_hidden[0].device.type
        with (
            torch.set_grad_enabled(any(self.needs)),
            torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            return prepare(
                *_model(student, self.student_scale, self.student_softcap),
                teacher_hidden,
                teacher_head,
                self.labels,
                self._asdict(),
                fields=self.fields.split(","),
                names=tuple(self.names.split(",")),
                look=look,
            )

    def into(self, tensors: Tensors, logits: torch.dtype) -> tuple[torch.dtype, ...]:
        """The dtype in which every weight's gradient is summed."""
        chosen = tuple(self.weight_grad.split(","))
        return accumulation(chosen if len(chosen) > 1 else chosen[0], tensors, logits)


def _model(parts: list[tuple], scales: list[float], softcaps: list[float]) -> tuple[Any, Any]:
    """Hidden states and head as callers pass them."""
    if not parts:
        return None, None
    heads = [
        LMHead(weight, bias, scale, softcap or None)
        for (_, weight, bias), scale, softcap in zip(parts, scales, softcaps, strict=True)
    ]
    if len(heads) == 1:
        return parts[0][0], heads[0]
    return tuple(hidden for hidden, _, _ in parts), LMHeadSum(tuple(heads))


_TYPES = {
    list[Tensor]: "Tensor[]",
    list[bool]: "bool[]",
    list[float]: "float[]",
    float: "float",
    int: "SymInt",
    str: "str",
    Tensor | None: "Tensor?",
    int | None: "SymInt?",
    torch.dtype | None: "ScalarType?",
}
_SCHEMA = ", ".join(f"{_TYPES[hint]} {name}" for name, hint in Arguments.__annotations__.items())


def _operator(name: str, *, before: str = "", after: str = ""):
    """An operator whose arguments are some of its own and `Arguments`, and that returns tensors."""
    schema = f"({', '.join(part for part in (before, _SCHEMA, after) if part)}) -> Tensor[]"
    return torch.library.custom_op(
        f"minillm::{name}", mutates_args=(), schema=schema, tags=(torch.Tag.cudagraph_unsafe,)
    )


@_operator("statistics")
def statistics(*flat) -> list[Tensor]:
    """The fields (...), what the gradient reads (S, N), and the number of kept tokens on the host, ()."""
    arguments = Arguments(*flat)
    problem, tensors = arguments.prepare()
    with torch.no_grad(), torch.autocast(tensors.device.type, enabled=False):
        found = compute_statistics(problem, tensors, graded=any(arguments.needs))
        fields = [
            problem.spread(found[name], tensors.kept).reshape(problem.shape).clone() for name in problem.spec.fields
        ]
        names = _saved_names(problem)
        saved = torch.zeros(len(names), tensors.rows, dtype=problem.logits, device=tensors.device)
        for name, row in zip(names, saved, strict=True):
            if name in found:
                row[: problem.kept] = found[name]
    return [*fields, saved, torch.tensor(problem.kept)]


def _saved_names(problem: Problem) -> tuple[str, ...]:
    return (*(name for name in problem.spec.fields if not name.endswith("argmax")), *BESIDES)


@statistics.register_fake
def _(*flat) -> list[Tensor]:
    problem, tensors = Arguments(*flat).prepare(look=False)
    device, rows = tensors.device, tensors.rows
    fields = [
        torch.empty(problem.shape, dtype=torch.int64 if name.endswith("argmax") else problem.logits, device=device)
        for name in problem.spec.fields
    ]
    saved = torch.empty(len(_saved_names(problem)), rows, dtype=problem.logits, device=device)
    return [*fields, saved, torch.empty((), dtype=torch.int64, device="cpu")]


@_operator("statistics_gradient", before="Tensor[] upstream, bool[] has_upstream, Tensor saved, Tensor count")
def statistics_gradient(upstream, has_upstream, saved, count, *flat) -> list[Tensor]:
    """The gradients of the leaves that need one, in their shapes and dtypes. `upstream`: of the fields that have any."""
    arguments = Arguments(*flat)
    problem, tensors = arguments._replace(kept=int(count)).prepare()
    given, coefficients = iter(upstream), {}
    for name, has in zip(problem.spec.fields, has_upstream, strict=True):
        if has:
            gradient = next(given).reshape(-1).to(problem.logits)
            coefficients[name] = gradient if tensors.kept is None else gradient[tensors.kept]
    known = {name: row[: problem.kept] for name, row in zip(_saved_names(problem), saved, strict=True)}
    with torch.no_grad(), torch.autocast(tensors.device.type, enabled=False):
        gradients = compute_gradients(
            problem, tensors, known, coefficients, arguments.needs, arguments.into(tensors, problem.logits)
        )
    found = [gradient for gradient, needed in zip(gradients, arguments.needs, strict=True) if needed]
    return [gradient.reshape(leaf.shape) for gradient, leaf in zip(found, arguments.needed, strict=True)]


@statistics_gradient.register_fake
def _(upstream, has_upstream, saved, count, *flat) -> list[Tensor]:
    return [torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) for leaf in Arguments(*flat).needed]


_LISTS = tuple(name for name, hint in Arguments.__annotations__.items() if hint == list[Tensor])


def _keep_statistics(ctx, inputs: tuple, output: list[Tensor]) -> None:
    arguments = Arguments(*inputs)
    ctx.lengths = {name: len(getattr(arguments, name)) for name in _LISTS}
    ctx.save_for_backward(*output[-2:], arguments.labels, *(one for name in _LISTS for one in getattr(arguments, name)))
    ctx.arguments = arguments._replace(labels=None, **dict.fromkeys(_LISTS, []))
    ctx.set_materialize_grads(False)


def _statistics_backward(ctx, upstream: list[Tensor | None]) -> tuple:
    saved, count, labels, *flat = ctx.saved_tensors  # once: activation checkpointing allows no second look
    parts = iter(flat)
    lists = {name: [next(parts) for _ in range(length)] for name, length in ctx.lengths.items()}
    arguments = ctx.arguments._replace(labels=labels, **lists)
    given = [
        gradient if FIELDS[name].differentiable else None
        for name, gradient in zip(arguments.fields.split(","), upstream[:-2], strict=True)
    ]
    gradients = statistics_gradient(
        [gradient for gradient in given if gradient is not None],
        [gradient is not None for gradient in given],
        saved,
        count,
        *arguments,
    )
    return _as_inputs(ctx, gradients)


def _as_inputs(ctx, gradients: list[Tensor | None]) -> tuple:
    """The gradients in the places of the leaves that need them, None everywhere else."""
    arguments, found = ctx.arguments, iter(gradients)
    leaves = [next(found) if needed else None for needed in arguments.needs]
    placed = {name: [None] * length for name, length in ctx.lengths.items()}
    placed |= {"student_hidden": leaves[0::3], "student_weight": leaves[1::3]}
    biases = zip(arguments.student_has_bias, leaves[2::3], strict=True)
    placed["student_bias"] = [gradient for has, gradient in biases if has]
    # an empty list of numbers counts as one of tensors
    return tuple(placed.get(name, [] if value == [] else None) for name, value in arguments._asdict().items())


statistics.register_autograd(_statistics_backward, setup_context=_keep_statistics)


@_operator("statistic_sum", after="float factor")
def statistic_sum(*flat) -> list[Tensor]:
    """The sum over kept tokens of factor times the one field, (); their number on the host, (); and the gradients of the
    leaves that need one, before the factor of the loss: hidden states (N, H), weight, bias."""
    *flat, factor = flat
    arguments = Arguments(*flat)
    problem, tensors = arguments.prepare()
    loss, _, sums = sum_and_gradients(
        problem,
        tensors,
        Statistic(arguments.fields, factor),
        {},
        arguments.needs,
        arguments.into(tensors, problem.logits),
    )
    return [loss, torch.tensor(problem.kept), *_needed_totals(arguments, sums)]


def _needed_totals(arguments: Arguments, sums) -> list[Tensor]:
    return [] if sums is None else [total for total, needed in zip(sums.totals, arguments.needs, strict=True) if needed]


@statistic_sum.register_fake
def _(*flat) -> list[Tensor]:
    arguments = Arguments(*flat[:-1])
    problem, tensors = arguments.prepare(look=False)
    sums = problem.gradients(tensors, arguments.needs, arguments.into(tensors, problem.logits))
    loss = torch.empty((), dtype=problem.logits, device=tensors.device)
    return [loss, torch.empty((), dtype=torch.int64, device="cpu"), *_needed_totals(arguments, sums)]


def _keep_sums(ctx, inputs: tuple, output: list[Tensor]) -> None:
    arguments = Arguments(*inputs[:-1])
    ctx.lengths = {name: len(getattr(arguments, name)) for name in _LISTS}
    ctx.leaves = [(leaf.shape, leaf.dtype) for leaf in arguments.needed]
    ctx.arguments = arguments._replace(labels=None, **dict.fromkeys(_LISTS, []))
    ctx.save_for_backward(*output[2:])
    ctx.set_materialize_grads(False)


def _sum_backward(ctx, upstream: list[Tensor | None]) -> tuple:
    factor = upstream[0]
    gradients = [
        None if factor is None else (total * factor).to(dtype).reshape(shape)
        for total, (shape, dtype) in zip(ctx.saved_tensors, ctx.leaves, strict=True)
    ]
    return (*_as_inputs(ctx, gradients), None)


statistic_sum.register_autograd(_sum_backward, setup_context=_keep_sums)
