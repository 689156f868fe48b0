"""Twins of the layers of a quantised teacher: the same packed weights as bitsandbytes, and the same buffers in a pass."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minillm.config.models import Quantization
from minillm.models.adapter_targets import target_names

BLOCK, BLOCK_OF_SCALES = 64, 256  # nf4: weights that share a scale, scales that share one of theirs


class _Twin(nn.Module):
    """A layer whose numbers mean nothing. `elements` of its packed weight is how many weights that stands for."""

    def __init__(self, layer: nn.Linear | Conv1D):
        super().__init__()
        self.inputs, self.outputs = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
        self.bias = layer.bias
        count = self.inputs * self.outputs
        self.weight = nn.Parameter(self.packed(count), requires_grad=False)
        self.weight.elements = count


class Int8Layer(_Twin):
    def packed(self, count: int) -> Tensor:
        self.register_buffer("scales", torch.empty(self.outputs))
        return torch.empty(count, dtype=torch.int8)

    def forward(self, hidden: Tensor) -> Tensor:  # (..., inputs) -> (..., outputs)
        half = hidden.to(torch.float16)
        narrow = torch.empty_like(half, dtype=torch.int8)
        sums = torch.empty(*hidden.shape[:-1], self.outputs, dtype=torch.int32)
        del narrow
        return torch.empty_like(sums, dtype=torch.float16).to(hidden.dtype)


class Nf4Layer(_Twin):
    def packed(self, count: int) -> Tensor:
        self.register_buffer("scales", torch.empty(count // BLOCK, dtype=torch.uint8))
        self.register_buffer("scales_of_scales", torch.empty(count // BLOCK // BLOCK_OF_SCALES))
        return torch.empty(count // 2, dtype=torch.uint8)

    def forward(self, hidden: Tensor) -> Tensor:  # (..., inputs) -> (..., outputs)
        scales = torch.empty_like(self.scales, dtype=torch.float32)
        weight = torch.empty(self.outputs, self.inputs, dtype=hidden.dtype)
        del scales
        return nn.functional.linear(hidden, weight, self.bias)


TWINS: dict[Quantization, type[_Twin]] = {"int8": Int8Layer, "nf4": Nf4Layer}


def quantize(model: PreTrainedModel, kind: Quantization) -> None:
    """Replace all linear layers below the head by twins, as transformers does by layers of bitsandbytes."""
    for name in target_names(model, "all-linear"):
        model.set_submodule(name, TWINS[kind](model.get_submodule(name)))
