"""The product of a decode step, few rows by a whole head, on a CPU: from a copy of the weight in the order in which oneDNN
reads it."""

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # (B, H) -> (B, V), both fp32


def packed_product(weight: Tensor) -> Product | None:  # (V, H)
    """hidden W^T from a copy of W, as it is now; None where there is no such copy: elsewhere than in fp32 on a CPU."""
    operators = torch.ops.mkldnn
    plain = type(weight) in (Tensor, torch.nn.Parameter)  # of a fake tensor there is nothing to copy
    if not (plain and weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.enabled):
        return None
    if not (hasattr(operators, "_reorder_linear_weight") and hasattr(operators, "_linear_pointwise")):
        return None  # they are torch's own, for compiled models, and not promised to stay
    copy = operators._reorder_linear_weight(weight.detach())
    return lambda hidden: operators._linear_pointwise(hidden, copy, None, "none", [], "")
