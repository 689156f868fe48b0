"""The auxiliary loss of mixture-of-experts models: how evenly their routers spread tokens over experts."""

import sys

from torch import Tensor
from transformers import PreTrainedModel

from minillm import UserError


def balance_problem(model: PreTrainedModel, *, added: bool) -> str | None:
    """The warning for a mixture of experts that trains without its balance loss; None for every other model.

    Args:
        added: that loss is part of the stage's.
    """
    experts = hasattr(sys.modules[type(model).__module__], "load_balancing_loss_func")
    if added or not experts:
        return None
    return (
        f"the student, {type(model).__name__}, is a mixture of experts, and this method's loss leaves out what balances its "
        "routers: watch that no expert falls out of use in a long run"
    )


def balance_loss(model: PreTrainedModel, output, attention_mask: Tensor) -> Tensor:  # (B, L) -> ()
    """The load-balancing loss of the architecture's own code over the router logits of a forward pass.

    Args:
        model: the language model that ran.
        output: of its decoder, with `output_router_logits`.
        attention_mask: padding is not counted.

    Raises UserError for an architecture that has no such loss.
    """
    config = model.config.get_text_config()
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    logits = getattr(output, "router_logits", None)
    if function is None or not logits:
        raise UserError(
            f"{type(model).__name__} has no routers, so there is no auxiliary loss to add; leave its weight at 0"
        )
    experts = next(
        getattr(config, name)
        for name in ("num_local_experts", "num_experts", "n_routed_experts")
        if hasattr(config, name)
    )
    return function(logits, experts, config.num_experts_per_tok, attention_mask)
