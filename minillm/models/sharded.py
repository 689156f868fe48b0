"""Models whose weights ZeRO-3 has cut into a piece a rank: made whole for a while, and collected for a file."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from minillm import distributed

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def is_sharded(model: nn.Module | None) -> bool:
    """Whether the model's weights lie in pieces, gathered now or not."""
    return model is not None and any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def whole(*models: nn.Module | None) -> Iterator[None]:
    """All weights of the models on every rank, to be read. All ranks must enter and leave together; inside, no rank
    waits for another, so that each may run as many forward passes as it likes. Nothing happens for whole models."""
    sharded = [model for model in models if is_sharded(model) and not getattr(model, "is_whole", False)]
    parameters = [parameter for model in sharded for parameter in model.parameters()]
    if not parameters:
        yield
        return
    import deepspeed

    # DeepSpeed's hooks would release each layer after its forward pass, and wait for the other ranks before the next
    modules = {id(module): module for model in sharded for module in model.modules()}.values()
    hooks = [(module, name, getattr(module, name)) for module in modules for name in _HOOKS]
    with deepspeed.zero.GatheredParameters(parameters):
        for module, name, _ in hooks:
            setattr(module, name, OrderedDict())
        for model in sharded:
            model.is_whole = True
        try:
            yield
        finally:
            for model in sharded:
                model.is_whole = False
            for module, name, before in hooks:
                setattr(module, name, before)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict on rank 0's CPU, gathered one weight at a time; on other ranks it is empty."""
    import deepspeed

    state, known = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in known:
            with deepspeed.zero.GatheredParameters([parameter]):
                known[id(parameter)] = parameter.detach().cpu().clone() if distributed.rank() == 0 else None
        state[name] = known[id(parameter)]
    if distributed.rank():
        return {}
    persistent = model.state_dict().keys()
    state |= {name: buffer.cpu() for name, buffer in model.named_buffers() if name in persistent}
    return {name: tensor for name, tensor in state.items() if name in persistent}
