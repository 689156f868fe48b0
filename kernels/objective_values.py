"""Calls of a caller's objective: its loss and metrics, summed, and the derivative with respect to each statistic."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from minillm.kernels.divergences import FIELDS
from minillm.kernels.token_stats import TokenStats

Objective = Callable[..., Tensor | tuple[Tensor, Mapping[str, Tensor]]]


class ObjectiveValues:
    """The sum of objective(stats, **inputs) and of its metrics over calls with a few tokens each, or over one call with
    all tokens of which the objective may couple any.

    With `graded`, a call returns the derivative of its loss with respect to each statistic that it depends on.
    """

    def __init__(self, objective: Objective, *, graded: bool):
        self.objective, self.graded = objective, graded
        self.losses: list[Tensor] = []
        self.metrics: dict[str, list[Tensor]] = {}

    def rows(self, values: dict[str, Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:  # (C,) each
        """One call whose tokens are independent. The derivatives are (C,) each."""
        size = next(iter(values.values())).shape
        expected = (
            f"the loss of each of the {size.numel()} tokens of a chunk, a floating-point tensor of shape {(*size,)}"
        )

        def counted(value: Tensor) -> Tensor | None:
            return value if value.shape == size else None

        return self._call(values, inputs, counted, expected, f"have shape {(*size,)}, one value a token")

    def all_rows(
        self,
        values: dict[str, Tensor],  # (...) each; 0, and -1 for indices, where ignored
        inputs: dict[str, Tensor],  # (...) each
        kept: Tensor | None,  # (K,) rows that are not ignored; None: all
    ) -> dict[str, Tensor]:
        """One call with every token. What it returns in the shape of the tokens counts where they are kept; anything
        else is summed as it is, and is 0 where no token is kept. The derivatives are (...) each.
        """
        size = next(iter(values.values())).shape
        nothing_kept = size.numel() == 0 if kept is None else len(kept) == 0

        def counted(value: Tensor) -> Tensor:
            value, of_tokens = value.reshape(-1), value.shape == size
            if nothing_kept:
                return value[:0]
            return value if kept is None or not of_tokens else value[kept]

        return self._call(values, inputs, counted, "a floating-point tensor", "be a tensor")

    def _call(
        self,
        values: dict[str, Tensor],
        inputs: dict[str, Tensor],
        counted: Callable[[Tensor], Tensor | None],  # the values to sum, 1-D; None for a wrong shape
        loss_expected: str,
        metric_expected: str,
    ) -> dict[str, Tensor]:
        dtype = next((value.dtype for value in values.values() if value.is_floating_point()), torch.float32)
        with torch.set_grad_enabled(self.graded):
            leaves = {
                name: value.detach().requires_grad_(self.graded)
                for name, value in values.items()
                if FIELDS[name].differentiable
            }
            result = self.objective(TokenStats({**values, **leaves}), **inputs)
            loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
            kept = counted(loss.to(dtype)) if isinstance(loss, Tensor) and loss.is_floating_point() else None
            if kept is None:
                got = f"{tuple(loss.shape)} {loss.dtype}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"objective must return {loss_expected}, or (loss, {{name: metric}}); got {got}")
            derivatives = {}
            if kept.requires_grad:
                _check_closure(kept, list(leaves.values()))
                found = torch.autograd.grad(kept.sum(), list(leaves.values()), allow_unused=True)
                derivatives = {
                    name: gradient.to(dtype)
                    for name, gradient in zip(leaves, found, strict=True)
                    if gradient is not None
                }
        self.losses.append(kept.detach())
        for name, metric in metrics.items():
            value = counted(metric.detach().to(dtype)) if isinstance(metric, Tensor) else None
            if value is None:
                got = tuple(metric.shape) if isinstance(metric, Tensor) else type(metric).__name__
                raise ValueError(f"objective: metric {name!r} must {metric_expected}; got {got}")
            self.metrics.setdefault(name, []).append(value)
        return derivatives

    def result(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the metrics, scalars."""
        return torch.cat(self.losses).sum(), {name: torch.cat(parts).sum() for name, parts in self.metrics.items()}


def _check_closure(loss: Tensor, leaves: list[Tensor]) -> None:
    """A tensor that the objective captured would silently get no gradient."""
    known = {id(leaf) for leaf in leaves}
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable") and id(node.variable) not in known:
            raise ValueError(
                "objective depends on a tensor that requires grad and is not one of the statistics (shape "
                f"{tuple(node.variable.shape)}); it would get no gradient here: detach it"
            )
        stack.extend(parent for parent, _ in node.next_functions)
