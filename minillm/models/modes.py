"""Running models for their outputs alone."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def sampling_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    """Evaluation mode, no gradient; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        # not inference_mode: buffers that a forward pass replaces (rotary frequencies) must serve training again
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
