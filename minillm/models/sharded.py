"""Models whose weights ZeRO-3 has cut into a piece a rank: made whole for a while, and collected for a file."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakSet

import torch
from torch import Tensor, nn

from minillm.distributed import collectives

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_gathered: WeakSet[nn.Module] = WeakSet()  # by a context that is open


def is_sharded(model: nn.Module | None) -> bool:
    """True where the model's weights lie in pieces, gathered now or not."""
    return model is not None and any(hasattr(parameter, "ds_id") for parameter in model.parameters())


@contextmanager
def gathered(*models: nn.Module | None, by_layers: bool) -> Iterator[None]:
    """The models can be run and their heads read, without a gradient. All ranks must enter and leave together.

    With `by_layers` the heads alone are whole, and all ranks must run the same forward passes: a layer comes together
    when all have reached it. Without, everything is whole, and each rank may run what it likes.
    """
    if not by_layers:
        with fully_gathered(*models):
            yield
        return
    with ExitStack() as heads:
        for model in models:
            if is_sharded(model):
                heads.enter_context(fully_gathered(*_holders(model, model.get_output_embeddings().weight)))
        yield


def _holders(model: nn.Module, weight: Tensor) -> list[nn.Module]:
    """The modules that use a weight: a tied head is the token table too."""
    return [module for module in model.modules() if any(one is weight for one in module.parameters(recurse=False))]


@contextmanager
def fully_gathered(*modules: nn.Module | None) -> Iterator[None]:
    """All weights of the modules on every rank, to be read. All ranks must enter and leave together; inside, no rank
    waits for another, so that each may run as many forward passes as it likes. Nothing happens for whole modules."""
    sharded = [module for module in modules if is_sharded(module) and module not in _gathered]
    parameters = list({id(one): one for module in sharded for one in module.parameters()}.values())
    if not parameters:
        yield
        return
    import deepspeed

    # DeepSpeed's hooks would release each layer after its forward pass, and wait for the other ranks before the next; others,
    # such as those by which a vision tower gives hidden states of inner layers, have their work here too
    inner = {id(module): module for part in sharded for module in part.modules()}.values()
    hooks = [getattr(module, name) for module in inner for name in _HOOKS]  # {number: hook}, each
    with deepspeed.zero.GatheredParameters(parameters):
        taken = [_take_those_of_deepspeed(of_one) for of_one in hooks]
        newly = [module for module in inner if module not in _gathered]
        _gathered.update(newly)
        try:
            yield
        finally:
            _gathered.difference_update(newly)
            for of_one, out in zip(hooks, taken, strict=True):
                everything = sorted({**of_one, **out}.items())  # in the order in which they were registered
                of_one.clear()
                of_one.update(everything)


def _take_those_of_deepspeed(hooks: dict[int, Callable]) -> dict[int, Callable]:
    """Take them out of a module's hooks; returns them."""
    taken = {
        number: hook
        for number, hook in hooks.items()
        if (getattr(hook, "__module__", None) or "").partition(".")[0] == "deepspeed"
    }
    for number in taken:
        del hooks[number]
    return taken


def name_accelerator() -> None:
    """Tell DeepSpeed which accelerator there is: it warns where it finds none by itself, and whatever imports it where
    it is installed, as accelerate does when a model is saved, would have it warn in runs that do not use it."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def release(engine, *modules: nn.Module) -> None:
    """Give back the memory of modules that a DeepSpeed engine trains or shards; none of them is of use afterwards.

    All ranks together. Dropping them is not enough: classes of autograd functions, a cached method and a stack of
    modules hold every module that DeepSpeed has seen, and through its parameters the optimiser, to the end of the process.
    """
    engine.destroy()
    for optimizer in (engine.optimizer, engine.basic_optimizer):
        if optimizer is not None:
            vars(optimizer).clear()
    for parameter in (parameter for module in modules for parameter in module.parameters()):
        parameter.data, parameter.grad = parameter.data.new_empty(0), None
        vars(parameter).clear()  # this rank's shard, and the optimiser


def gathered_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict on rank 0's CPU, gathered one weight at a time; on other ranks it is empty."""
    import deepspeed

    state, known = {}, {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in known:
            with deepspeed.zero.GatheredParameters([parameter]):
                known[id(parameter)] = parameter.detach().cpu().clone() if collectives.rank() == 0 else None
        state[name] = known[id(parameter)]
    if collectives.rank():
        return {}
    persistent = model.state_dict().keys()
    state |= {name: buffer.to("cpu", copy=True) for name, buffer in model.named_buffers() if name in persistent}
    return {name: tensor for name, tensor in state.items() if name in persistent}
