"""Projectors: small trained modules that take a student's hidden states to the width of its teacher's."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from minillm import UserError
from minillm.models.families import text_config
from minillm.models.pruning import layer_count


def make_projectors(
    student: PreTrainedModel, teacher: PreTrainedModel, pairs: Sequence[tuple[int, int]], *, seed: int
) -> nn.ModuleList:
    """A projector for every pair of a student's and a teacher's layer: Linear, GELU, Linear, both to the teacher's width.

    Their weights depend on `seed` alone; dtype and device are the student's. Layers are numbered as
    minillm.models.access.forward_layers has them.

    Raises UserError for a layer that a model does not have.
    """
    made = []
    for place, (of_student, of_teacher) in enumerate(pairs):
        width = layer_width(student, of_student, "student")
        target = layer_width(teacher, of_teacher, "teacher")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + place)
            made.append(nn.Sequential(nn.Linear(width, target), nn.GELU(), nn.Linear(target, target)))
    projectors = nn.ModuleList(made)
    for parameter in projectors.parameters():
        parameter.data = parameter.data.to(student.device, student.dtype)
    return projectors


def layer_width(model: PreTrainedModel, layer: int, who: str) -> int:
    """The width of a layer's hidden states. Raises UserError for a layer that is not there; `who` is its model's role."""
    count = layer_count(model.config)
    if not -1 <= layer <= count:
        raise UserError(
            f"method.layers: the {who} has {count} layers, and there is no layer {layer}; expected 0 to {count}, or -1 for the "
            "last"
        )
    if layer in (-1, count):
        weight = model.get_output_embeddings().weight
        return getattr(weight, "ds_shape", weight.shape)[1]  # OPT projects what its head reads
    return hidden_width(model.config)


def hidden_width(config: PreTrainedConfig) -> int:
    """The width between a language model's layers."""
    return text_config(config).hidden_size
