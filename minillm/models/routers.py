"""The auxiliary loss of mixture-of-experts models: how evenly their routers spread tokens over experts."""

import sys

from torch import Tensor
from transformers import PreTrainedModel

from minillm import UserError


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
