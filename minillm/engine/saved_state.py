"""The state that an engine reads from a checkpoint, compared with what it is read into before anything is changed.

torch takes moments of any shape for an optimiser's, and anything for a schedule's; the next step would fail on them.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from minillm import UserError


def check_optimizer_state(saved: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Raises UserError where a state of an optimiser does not fit the weights that this one steps, naming the weight."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for index, moments in saved["state"].items():
        if index not in range(len(weights)):
            raise UserError(f"the optimiser's state is of weight {index}, and there are {len(weights)} weights")
        for name, moment in moments.items():
            expected = tuple(weights[index].shape) if name != "step" else ()
            if not isinstance(moment, Tensor) or tuple(moment.shape) != expected:
                raise UserError(f"{name} of weight {index} is {_shape(moment)}, the weight {expected}")
    counts = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], optimizer.param_groups)]
    if counts[0] != counts[1]:
        raise UserError(f"the optimiser's groups are of {counts[0]} weights, this run's of {counts[1]}")


def check_schedule_state(saved: Mapping[str, Any], scheduler: LRScheduler) -> None:
    """Raises UserError where a state of a schedule is not one of a schedule like this."""
    step, rates = saved["last_epoch"], saved["base_lrs"]
    if type(step) is not int or step < 0:
        raise UserError(f"last_epoch of the schedule is {step!r}, not a number of steps")
    if len(rates) != len(scheduler.base_lrs):
        raise UserError(f"the schedule is of {len(rates)} groups of weights, this run's of {len(scheduler.base_lrs)}")


def check_same_shapes(saved: Any, own: Any, where: str) -> None:
    """Raises UserError where two nested states hold tensors of different shapes, naming the place. Keys that only one of
    them has are passed over."""
    if isinstance(own, Mapping) and isinstance(saved, Mapping):
        for key in own.keys() & saved.keys():
            check_same_shapes(saved[key], own[key], f"{where}.{key}")
    elif isinstance(own, list | tuple) and isinstance(saved, list | tuple):
        if len(own) != len(saved):
            raise UserError(f"{where} has {len(saved)} parts, this run's {len(own)}")
        for place, (one, other) in enumerate(zip(saved, own, strict=True)):
            check_same_shapes(one, other, f"{where}.{place}")
    elif isinstance(own, Tensor) and (not isinstance(saved, Tensor) or saved.shape != own.shape):
        raise UserError(f"{where} is {_shape(saved)}, this run's {tuple(own.shape)}")


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"no tensor ({type(value).__name__})"
