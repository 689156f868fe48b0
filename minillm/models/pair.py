"""The models of a stage, as everything above them sees them."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Models:
    """A student, perhaps a teacher, and what they share."""

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase  # the student's
    vocab_size: int  # ids that both heads have
    eos_ids: tuple[int, ...]  # any of them ends an answer
    pad_id: int
    device: torch.device
    by_layers: bool = False  # sharded weights come together a layer at a time: all ranks run the same forward passes
    cuda_graphs: bool = (
        False  # sampling replays a captured step for every token; minillm.rollout.local.graph_preconditions sets it
    )
