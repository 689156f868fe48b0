"""Embeddings as their file has them: some architectures set the padding's row to 0 after it has been read."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def embeddings_kept() -> Iterator[None]:
    """While models are read, tables of embeddings that came from a file are not initialised.

    transformers initialises what no file had, and keeps the rest by a mark on each parameter; a row of a parameter
    (`init.zeros_(weight.data[padding_idx])`, in Youtu and BLT) has none. For code from elsewhere it passes over modules
    whose parameters are all marked, which is asked for here.
    """
    original = PreTrainedModel._initialize_weights

    def initialize(self: PreTrainedModel, module: nn.Module, is_custom_code: bool = False) -> None:
        original(self, module, is_custom_code or isinstance(module, nn.Embedding))

    PreTrainedModel._initialize_weights = initialize
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = original
