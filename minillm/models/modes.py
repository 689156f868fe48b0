"""Running models for their outputs alone, and training them."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from minillm.models.access import checkpoint_activations
from minillm.models.loading import without_dropout


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


def train_mode(modules: Iterable[nn.Module], *, checkpointing: bool) -> None:
    """Training mode without dropout. With `checkpointing`, which needs that mode, language models keep few activations."""
    for module in modules:
        module.train()
        if isinstance(module, PreTrainedModel):
            without_dropout(module)
            if checkpointing:
                checkpoint_activations(module)
