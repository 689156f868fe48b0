"""The routers of mixture-of-experts models: what they decide in a forward pass, their balance loss, the experts' load."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from minillm import UserError
from minillm.models.families import text_config, text_model

WEIGHT = "train.router_aux_loss_coef"


@dataclass
class Routing:
    """The decisions of one forward pass, a tensor for each layer with experts; empty for a dense model."""

    logits: list[Tensor] = field(default_factory=list)  # (B L, E) each, with their gradient
    chosen: list[Tensor] = field(default_factory=list)  # (B L, k) int64 each: the experts that a token is sent to


def experts_of(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that hold a layer's experts as transformers fuses them, from the first layer on."""
    return [module for module in text_model(model).modules() if hasattr(module, "num_experts") and _is_fused(module)]


def _is_fused(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") and hasattr(module, "has_gate")


def routers_of(model: PreTrainedModel) -> list[tuple[nn.Module, int]]:
    """The modules that give router logits, as the architecture's own code names them, and where in their outputs."""
    body = text_model(model)
    recorders = (getattr(body, "_can_record_outputs", None) or {}).get("router_logits", ())
    recorders = [recorders] if isinstance(recorders, OutputRecorder) else recorders
    return [
        (module, one.index)
        for name, module in body.named_modules()
        for one in recorders
        if type(module) is one.target_class and name.endswith(one.layer_name or "")
    ]


@contextmanager
def recorded_routing(model: PreTrainedModel) -> Iterator[Routing]:
    """Record the decisions of the forward pass inside; what is computed again in a backward pass is not recorded.

    The architectures' own `output_router_logits` is lost where a model of images and text runs the language model.
    """
    routing = Routing()

    def keep_logits(index: int) -> Callable:
        return lambda module, inputs, output: routing.logits.append(output[index])

    def keep_chosen(module: nn.Module, inputs: tuple) -> None:  # (hidden, chosen, weights)
        routing.chosen.append(inputs[1])

    hooks = [module.register_forward_hook(keep_logits(index)) for module, index in routers_of(model)]
    hooks += [module.register_forward_pre_hook(keep_chosen) for module in experts_of(model)]
    try:
        yield routing
    finally:
        for hook in hooks:
            hook.remove()


def balance_problem(model: PreTrainedModel, *, added: bool) -> str | None:
    """The warning for a mixture of experts that trains without its balance loss; None for every other model.

    Args:
        added: that loss is part of the stage's.
    """
    if added or _balance_function(model) is None:
        return None
    return (
        f"the student, {type(model).__name__}, is a mixture of experts, and nothing in the loss balances its routers: watch "
        f"that no expert falls out of use (the report shows their load), or give {WEIGHT}, such as 0.01"
    )


def require_balance(model: PreTrainedModel) -> None:
    """Raises UserError where a model has no balance loss that could be added to a stage's."""
    if _balance_function(model) is None or not routers_of(model):
        raise UserError(
            f"{type(model).__name__} has no routers, so there is no auxiliary loss to add; leave its weight ({WEIGHT}) at 0"
        )


def balance_loss(model: PreTrainedModel, routing: Routing, attention_mask: Tensor) -> Tensor:  # (B, L) -> ()
    """The load-balancing loss of the architecture's own code over the router logits of a forward pass.

    Args:
        model: the language model that ran.
        attention_mask: padding is not counted.

    Raises UserError for an architecture that has no such loss.
    """
    require_balance(model)
    config = text_config(model.config)
    experts = routing.logits[0].shape[-1]
    return _balance_function(model)(tuple(routing.logits), experts, config.num_experts_per_tok, attention_mask)


def _balance_function(model: PreTrainedModel) -> Callable | None:
    return getattr(sys.modules[type(text_model(model)).__module__], "load_balancing_loss_func", None)


@torch.no_grad()
def expert_tokens(
    routing: Routing,
    experts: int,  # E
    attention_mask: Tensor,  # (B, L)
) -> Tensor:  # (layers, E) int64
    """The number of times that real tokens were sent to each expert of each layer."""
    counts = torch.zeros(len(routing.chosen), experts, dtype=torch.int64, device=attention_mask.device)
    real = attention_mask.flatten().to(torch.int64)
    for row, chosen in zip(counts, routing.chosen, strict=True):
        row.scatter_add_(0, chosen.flatten(), real.repeat_interleave(chosen.shape[-1]))
    return counts


def load_metrics(tokens: Sequence[Sequence[int]]) -> dict[str, float | list[list[float]]]:
    """The experts' load for the records, from `expert_tokens` as lists.

    `expert_load` is the share of a layer's choices that each of its experts got, in the order of the layers;
    `expert_load_entropy_nats` the mean over layers of the shares' entropy, ln E where all experts get as much; then the
    smallest and the largest of all shares.
    """
    counts = torch.tensor(tokens, dtype=torch.float64)  # (layers, E)
    shares = counts / counts.sum(-1, keepdim=True).clamp_min(1)
    return {
        "expert_load": [[round(one, 5) for one in row] for row in shares.tolist()],
        "expert_load_entropy_nats": torch.special.entr(shares).sum(-1).mean().item(),
        "expert_load_least": shares.min().item(),
        "expert_load_most": shares.max().item(),
    }
