"""The optimiser and the schedule of every engine: AdamW, and a schedule of transformers."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler

from minillm.config.training import TrainConfig


def make_optimizer(
    modules: Mapping[str, nn.Module],
    train: TrainConfig,
    *,
    total_steps: int,
    learning_rates: Mapping[str, float] = MappingProxyType({}),
) -> tuple[torch.optim.AdamW, LRScheduler]:
    """AdamW over all weights of the modules that require a gradient, and its schedule.

    Args:
        modules: "student" and what is trained beside it.
        learning_rates: of modules that have another than train.learning_rate.
    """
    optimizer = torch.optim.AdamW(
        [
            {**group, "lr": learning_rates.get(name, train.learning_rate)}
            for name, module in modules.items()
            for group in _decay_groups(module, train.weight_decay)
        ],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,  # in place: the other implementations take one or two copies of the weights for a moment
    )
    scheduler = get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=train.warmup_steps,
        num_training_steps=total_steps,
        scheduler_specific_kwargs=dict(train.lr_scheduler_kwargs) or None,
    )
    return optimizer, scheduler


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay; biases and norms (vectors) do not."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.dim() >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]  # adapters are matrices alone
