"""TokenStats, and linear_token_stats: per-token statistics of student and teacher from hidden states.

Without autograd one pass; with it the backward pass recomputes the logits, a chunk of rows at a time (tiled: a tile), so
that every statistic takes any upstream gradient: four student GEMMs and two teacher GEMMs (`objective` needs three and
one).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Unpack

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from minillm.kernels.arguments import accumulation, prepare
from minillm.kernels.divergences import FIELDS
from minillm.kernels.double_backward import guard
from minillm.kernels.entry_point import entry_point
from minillm.kernels.head import Head, Hidden
from minillm.kernels.options import LossOptions, WeightGrad
from minillm.kernels.problem import Problem, Tensors
from minillm.kernels.recompute import compute_gradients, compute_statistics
from minillm.kernels.sparse_teacher import TopK


class TokenStats:
    """Per-token statistics in nats, one tensor each, read as attributes. p is the teacher's, q the student's row.

    student_logprob log q(y), teacher_logprob log p(y), reverse_kl KL(q || p), forward_kl KL(p || q),
    student_entropy, teacher_entropy, student_argmax, teacher_argmax (int64); where asked for by name also
    jsd, skew_forward_kl, skew_reverse_kl, tvd, interpolated_cross_entropy. Reading what was not computed raises an AttributeError that says so.
    """

    student_logprob: Tensor
    teacher_logprob: Tensor
    reverse_kl: Tensor
    forward_kl: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_argmax: Tensor
    teacher_argmax: Tensor
    jsd: Tensor
    skew_forward_kl: Tensor
    skew_reverse_kl: Tensor
    tvd: Tensor
    interpolated_cross_entropy: Tensor

    def __init__(self, values: Mapping[str, Tensor]):
        self.__dict__.update(values)

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the statistics that are here."""
        return tuple(self.__dict__)

    @property
    def reward(self) -> Tensor:
        """log p(y) - log q(y), the reward of a sampled token (MiniLLM, arXiv 2306.08543, section 2.2)."""
        values = self.__dict__
        self._require("teacher_logprob", "student_logprob")
        return values["teacher_logprob"] - values["student_logprob"]

    def _require(self, *names: str) -> None:
        missing = [name for name in names if name not in self.__dict__]
        if missing:
            raise AttributeError(
                f"{', '.join(missing)} not computed; pass fields=("
                f"{', '.join(repr(name) for name in (*self.fields, *missing))})"
            )

    def __getattr__(self, name: str) -> Tensor:
        if name == "reward":  # the property raised: let its reason be heard
            self._require("teacher_logprob", "student_logprob")
        if name in FIELDS:
            self._require(name)
        raise AttributeError(f"TokenStats has no attribute {name!r}; its statistics are {', '.join(self.fields)}")

    def __repr__(self) -> str:
        return f"TokenStats({', '.join(f'{name}: {tuple(value.shape)}' for name, value in self.__dict__.items())})"


@entry_point
def linear_token_stats(
    student_hidden: Hidden,  # (..., H_s), N tokens
    student_head: Head,  # weight (V, H_s)
    teacher_hidden: Hidden | TopK | None,  # (..., H_t)
    teacher_head: Head | None,  # weight (V, H_t); None with a TopK
    labels: Tensor | None,  # (...) integers
    *,
    fields: Iterable[str] | None = None,
    **options: Unpack[LossOptions],
) -> TokenStats:
    """Statistics of every token, (...) each, fp32 (float64 for float64 inputs), in nats; no full logits anywhere.

    Logits are softcap(logit_scale * (h W^T + b)) / temperature for both models. Ignored tokens (label ignore_index)
    get 0, and -1 for the argmaxes; they reach no GEMM. Every float statistic of the student is differentiable with
    respect to the student's hidden states, weight and bias, for any upstream gradient; the teacher is a constant.

    A head is an LMHead, a weight, or a linear module with PEFT's adapters. Weights that FSDP2 or ZeRO-3 have sharded are
    gathered, and their gradients reduced as their owner reduces them; `process_group` is for heads cut by vocabulary.
    torch.compile, torch.export and make_fx see one operator.

    Args:
        fields: the statistics to compute; None means the eight of TokenStats, less those that need a teacher or
            labels that are None, and those of them that a TopK can say.

    Raises:
        ValueError: shapes, dtypes, devices, vocabularies or labels that do not fit; an adapter on the head that is not LoRA
            without dropout, a head that is sharded over two dimensions of a mesh.
        TypeError: an unknown argument.
        RuntimeError: on double backward, and under the transforms of torch.func.
    """
    problem, tensors = prepare(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, options, fields=fields
    )
    return token_stats(problem, tensors, options["weight_grad"])


def token_stats(problem: Problem, tensors: Tensors, weight_grad: WeightGrad) -> TokenStats:
    """linear_token_stats on checked arguments."""
    into = accumulation(weight_grad, tensors, problem.logits)
    graded = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in tensors.leaves)
    flat, tree = tree_flatten(tensors)
    values = _TokenStats.apply(problem, into, graded, tree, *flat)
    return TokenStats(
        {name: value.reshape(problem.shape) for name, value in zip(problem.spec.fields, values, strict=True)}
    )


class _TokenStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        problem: Problem,
        into: Sequence[torch.dtype | Tensor],
        graded: bool,
        tree: TreeSpec,
        *flat: Tensor | None,
    ):
        tensors: Tensors = tree_unflatten(flat, tree)
        with torch.autocast(tensors.device.type, enabled=False):
            statistics = compute_statistics(problem, tensors, graded=graded)
        names = [name for name in statistics if not name.endswith("argmax")]
        ctx.problem, ctx.into, ctx.names, ctx.tree = problem, into, names, tree
        ctx.save_for_backward(*flat, *(statistics[name] for name in names))
        ctx.set_materialize_grads(False)
        fields = problem.spec.fields
        values = tuple(problem.spread(statistics[name], tensors.kept).clone() for name in fields)
        ctx.mark_non_differentiable(
            *(value for name, value in zip(fields, values, strict=True) if not FIELDS[name].differentiable)
        )
        return values

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor | None):
        problem: Problem = ctx.problem
        saved = ctx.saved_tensors  # once: activation checkpointing allows no second look
        count = ctx.tree.num_leaves
        tensors: Tensors = tree_unflatten(saved[:count], ctx.tree)
        statistics = dict(zip(ctx.names, saved[count:], strict=True))
        coefficients = {}
        for name, gradient in zip(problem.spec.fields, grad_outputs, strict=True):
            if gradient is not None and FIELDS[name].differentiable:
                gradient = gradient.detach().to(problem.logits)
                coefficients[name] = gradient if tensors.kept is None else gradient[tensors.kept]
        leaves = tensors.leaves
        needs = ctx.needs_input_grad[4 : 4 + len(leaves)]
        with torch.no_grad(), torch.autocast(tensors.device.type, enabled=False):
            gradients = compute_gradients(problem, tensors, statistics, coefficients, needs, ctx.into)
        return (None, None, None, None, *guard(gradients, leaves), *[None] * (count - len(leaves)))
