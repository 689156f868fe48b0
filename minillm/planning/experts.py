"""Twins of the experts of a mixture: the buffers of transformers' grouped products, in every dtype and without values.

Its kernel has a shape-only form for bfloat16 alone, and its loop over experts reads which of them have tokens.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "minillm_shapes"  # as `experts_implementation` names it


class _GroupedProduct(torch.autograd.Function):
    """The memory of a grouped product: rows (S, I), weights of all experts (E, I, O) or (E, O, I) -> (S, O)."""

    @staticmethod
    def forward(ctx, rows: Tensor, weights: Tensor, outputs: int) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return rows.new_empty(len(rows), outputs)

    @staticmethod
    def backward(ctx, _):
        gradients = (
            torch.empty_like(one) if needed else None
            for one, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[:2], strict=True)
        )
        return *gradients, None


def _product(experts: nn.Module, rows: Tensor, name: str, chosen: Tensor) -> Tensor:  # (S, I), (S,) -> (S, O)
    weights = getattr(experts, name)
    result = _GroupedProduct.apply(rows.to(weights.dtype), weights, weights.shape[2 if experts.is_transposed else 1])
    return result.add_(getattr(experts, f"{name}_bias")[chosen]) if experts.has_bias else result


def experts_forward(experts: nn.Module, hidden: Tensor, chosen: Tensor, mixture: Tensor) -> Tensor:
    """Run in the place of an experts module's own forward, as transformers calls it.

    Args:
        experts: the module, with the attributes that transformers gives all of them.
        hidden: (T, H), one row per token.
        chosen: (T, k) int64, the experts of each token.
        mixture: (T, k), their weights.
    """
    experts.experts_per_token = chosen.shape[1]
    order = torch.empty_like(chosen).flatten()  # (S,) with S = T k: rows sorted by their expert
    rows = hidden[order // chosen.shape[1]]  # (S, H)
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _product(experts, rows, name, order)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    rows = _product(experts, inner, "down_proj", order)
    if experts.has_post_expert_norm:
        rows = experts.post_expert_norm(rows)
    weighted = rows * mixture.flatten()[order, None]
    weighted = weighted[torch.empty_like(order)]  # as the tokens were
    return weighted.view(*chosen.shape, hidden.shape[1]).sum(1).to(hidden.dtype)


def idle_weights(model: PreTrainedModel) -> int:
    """Count the weights of experts that a token does not reach, in a model that has run."""
    mixtures = [module for module in model.modules() if hasattr(module, "experts_per_token")]
    if not mixtures:
        return 0
    reached = mixtures[0].experts_per_token
    alike = [module for module in model.modules() if type(module) is type(mixtures[0])]  # some layers may not have run
    return sum(
        sum(parameter.numel() for parameter in module.parameters())
        * (module.num_experts - reached)
        // module.num_experts
        for module in alike
    )


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
