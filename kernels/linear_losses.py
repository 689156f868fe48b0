"""The losses that most callers want: selected log-probabilities, cross-entropy, and one divergence to a teacher."""

from typing import Unpack

from torch import Tensor

from minillm.kernels.argument_checks import check_num_items
from minillm.kernels.arguments import prepare
from minillm.kernels.divergences import DIVERGENCES
from minillm.kernels.entry_point import entry_point
from minillm.kernels.head import Head, Hidden
from minillm.kernels.objective import Statistic, objective_sum
from minillm.kernels.options import HeadOptions, LossOptions, WeightGrad
from minillm.kernels.problem import Problem, Tensors
from minillm.kernels.sparse_teacher import TopK
from minillm.kernels.token_stats import token_stats

REDUCTIONS = ("mean", "sum", "none")


@entry_point
def linear_logprobs(
    hidden: Hidden,  # (..., H), N tokens
    head: Head,  # weight (V, H)
    labels: Tensor,  # (...) integers
    **options: Unpack[HeadOptions],
) -> Tensor:
    """log q(label) of every token, (...), fp32, in nats; 0 where ignored. Differentiable, for any upstream gradient.

    Raises what linear_token_stats raises.
    """
    problem, tensors = _one_model(hidden, head, labels, options)
    return token_stats(problem, tensors, options["weight_grad"]).student_logprob


@entry_point
def linear_cross_entropy(
    hidden: Hidden,  # (..., H), N tokens
    head: Head,  # weight (V, H)
    labels: Tensor,  # (...) integers
    *,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    **options: Unpack[HeadOptions],
) -> Tensor:
    """- log q(label): its mean over tokens that are not ignored, its sum, or (...) with reduction="none".

    `num_items` replaces the divisor of the mean where a batch is split over ranks or micro-batches. With mean and sum
    the gradient is computed in the forward pass (tiled: in the backward pass). Raises what linear_token_stats raises.
    """
    problem, tensors = _one_model(hidden, head, labels, options)
    return _reduce(problem, tensors, "student_logprob", -1.0, reduction, num_items, options["weight_grad"])


@entry_point
def linear_divergence(
    student_hidden: Hidden,  # (..., H_s), N tokens
    student_head: Head,  # weight (V, H_s)
    teacher_hidden: Hidden | TopK,  # (..., H_t)
    teacher_head: Head | None,  # weight (V, H_t); None with a TopK
    *,
    divergence: str = "reverse_kl",
    labels: Tensor | None = None,  # (...) integers in the vocabulary, of which only the ignored ones matter
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    **options: Unpack[LossOptions],
) -> Tensor:
    """A divergence of the student's q from the teacher's p over the whole vocabulary, in nats.

    `divergence`: forward_kl KL(p || q); reverse_kl KL(q || p); jsd, beta KL(p || m) + (1 - beta) KL(q || m) with
    m = beta p + (1 - beta) q (GKD, arXiv 2306.13649); skew_forward_kl KL(p || alpha p + (1 - alpha) q) and
    skew_reverse_kl KL(q || (1 - alpha) p + alpha q) (DistiLLM, arXiv 2402.03898); tvd, half the sum of |p - q|;
    interpolated_cross_entropy, of q under the constant target softmax((1 - t) z_s + t z_t), t the `interpolation` (TAID,
    arXiv 2501.16937): the entropy of the target, not 0, where both models agree. Of a TopK all are over its k ids and
    the tail.

    `reduction`: mean over tokens that are not ignored (all without labels), sum, or none: (...), 0 where ignored.
    `num_items` replaces the divisor of the mean where a batch is split over ranks or micro-batches. With mean and sum
    the gradient is computed in the forward pass (tiled: in the backward pass). Raises what linear_token_stats raises.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if teacher_hidden is None or (teacher_head is None and not isinstance(teacher_hidden, TopK)):
        raise ValueError("teacher_hidden and teacher_head must be given: a divergence needs both models")
    problem, tensors = prepare(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, options, fields=(divergence,)
    )
    return _reduce(problem, tensors, divergence, 1.0, reduction, num_items, options["weight_grad"])


def _one_model(hidden: Hidden, head: Head, labels: Tensor, options: HeadOptions) -> tuple[Problem, Tensors]:
    return prepare(hidden, head, None, None, labels, options, fields=("student_logprob",), names=("hidden", "head"))


def _reduce(
    problem: Problem,
    tensors: Tensors,
    field: str,
    sign: float,
    reduction: str,
    num_items: int | Tensor | None,
    weight_grad: WeightGrad,
) -> Tensor:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items is the divisor of reduction='mean'; it means nothing with {reduction!r}")
    if num_items is not None:
        check_num_items(num_items)
    if reduction == "none" or problem.backend == "tiled":
        values = getattr(token_stats(problem, tensors, weight_grad), field)
        values = values if sign == 1.0 else sign * values
        if reduction == "none":
            return values
        total = values.sum()
    else:
        total, _ = objective_sum(problem, tensors, Statistic(field, sign), {}, weight_grad)
    if reduction == "sum":
        return total
    if num_items is None:
        return total / max(problem.kept, 1)
    return total / (num_items.reshape(()) if isinstance(num_items, Tensor) else float(num_items))
