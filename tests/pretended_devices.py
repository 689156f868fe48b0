"""Devices that a machine does not have, pretended on its CPU: an operation on tensors of two of them raises.

Every tensor lies in the CPU's memory and knows, by its storage, the device that it was put on. What asks for that device
is told the pretended one, what makes a tensor on it or moves one there leaves its mark, and what computes carries the mark
from what goes in to what comes out. Rules are those of real devices: copies alone may cross, and a CPU's tensor of no
dimension goes with any other. A pretended device is of the type xpu, for which the project has no code of its own.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TYPE = "xpu"
CPU = torch.device("cpu")
aten = torch.ops.aten
CROSSING = {aten.copy_.default, aten._to_copy.default, aten.set_.source_Tensor}


class Places:
    """The pretended devices of storages; one that is not known is on the CPU."""

    def __init__(self):
        self.of_storage: dict[int, torch.device] = {}

    def of(self, tensor: Tensor) -> torch.device:
        if tensor.device.type != "cpu":  # of the meta device, or a fake one
            return tensor.device
        return self.of_storage.get(tensor.untyped_storage()._cdata, CPU)

    def put(self, tensor: Tensor, device: torch.device) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.of_storage:  # a storage keeps its Python object as long as it lives
            weakref.finalize(storage, self.of_storage.pop, storage._cdata, None).atexit = False
        self.of_storage[storage._cdata] = device


class Checked(TorchDispatchMode):
    """Refuses what mixes devices, and marks what comes out."""

    def __init__(self, places: Places):
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        written = _written(func, args, kwargs or {})
        places = {self.places.of(one) for one in given if one.dim() or any(one is other for other in written)}
        places |= {self.places.of(one) for one in given} - {CPU}
        if len(places) > 1 and func not in CROSSING:
            raise RuntimeError(f"{func} mixes tensors on {' and '.join(sorted(map(str, places)))}")
        result = func(*args, **(kwargs or {}))
        place = next(iter(places), CPU)
        mine = {one.untyped_storage()._cdata for one in given if one.device.type == "cpu"}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu" and place.type == TYPE:
                if leaf.untyped_storage()._cdata not in mine:
                    self.places.put(leaf, place)
        return result


def _written(func, args, kwargs) -> list[Tensor]:
    """The tensors that an operation writes to, which must be where it computes."""
    found = []
    for place, name in _writes(func):
        found += tree_leaves(args[place] if place < len(args) else kwargs.get(name))
    return [one for one in found if isinstance(one, Tensor)]


@cache
def _writes(func) -> list[tuple[int, str]]:
    """The arguments that an operation writes to, by their place and name."""
    return [
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]


class Moved(torch.autograd.Function):
    """A copy on another device, whose gradient comes back to this one."""

    @staticmethod
    def forward(ctx, tensor: Tensor, places: Places, device: torch.device) -> Tensor:
        ctx.places, ctx.home = places, places.of(tensor)
        copy = tensor.detach().clone()
        places.put(copy, device)
        return copy

    @staticmethod
    def backward(ctx, gradient: Tensor):
        copy = gradient.clone()
        ctx.places.put(copy, ctx.home)
        return copy, None, None


class Pretended(TorchFunctionMode):
    """Answers for the device of a tensor, and takes a device where one is named."""

    def __init__(self, places: Places):
        super().__init__()
        self.places = places

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            with torch._C.DisableTorchFunction():
                return self.places.of(args[0])
        if func in (Tensor.to, Tensor.cpu):
            return self._to(func, args, kwargs)
        if func == Tensor.numpy and self.places.of(args[0]) != CPU:
            raise TypeError(f"a tensor on {self.places.of(args[0])} has no array: copy it to the host")
        asked = kwargs.get("device")
        if asked is None or torch.device(asked).type not in (TYPE, "cpu"):
            return func(*args, **kwargs)
        result = func(*args, **{**kwargs, "device": CPU})
        self.places.put(result, torch.device(asked))
        return result

    def _to(self, func, args, kwargs):
        tensor, *rest = args
        target = CPU if func is Tensor.cpu else None
        named = [*rest, *kwargs.values()]
        for one in named:
            if isinstance(one, torch.device) or isinstance(one, str):
                target = torch.device(one)
            elif isinstance(one, Tensor):
                target = self.places.of(one)
        if target is None or target.type not in (TYPE, "cpu") or tensor.device.type == "meta":
            return func(*args, **kwargs)
        rest = [CPU if isinstance(one, torch.device | str) else one for one in rest]
        kwargs = {name: CPU if name == "device" else one for name, one in kwargs.items()}
        result = func(tensor, *rest, **kwargs)
        return result if self.places.of(result) == target else Moved.apply(result, self.places, target)


def grouped(tensorlistlist: list[list[Tensor]], with_indices: bool = False) -> dict:
    """What torch groups by the device in its own tables, which does not ask: as torch.utils._foreach_utils has it."""
    groups: dict = {}
    for place, one in enumerate(tensorlistlist[0]):
        lists, places = groups.setdefault((one.device, one.dtype), ([[] for _ in tensorlistlist], []))
        places += [place] * with_indices
        for kept, given in zip(lists, tensorlistlist, strict=True):
            kept.append(given[place])
    return groups


@contextmanager
def pretended_devices() -> Iterator[Places]:
    """Tensors can be on xpu:0, xpu:1, ... while the context is open."""
    places = Places()
    with (
        Pretended(places),
        Checked(places),
        mock.patch.object(clip_grad, "_group_tensors_by_device_and_dtype", grouped),
    ):
        yield places


@contextmanager
def pretended_gpus(monkeypatch, count: int = 2) -> Iterator[Places]:
    """`cuda:N` of a configuration is xpu:N, of which there are so many."""
    from minillm.models import device as devices

    real = devices.pick_device

    def pick(name: str, key: str = devices.ENGINE_KEY) -> torch.device:
        if not name.startswith("cuda"):
            return real(name, key)
        number = int(name.partition(":")[2] or 0)
        assert number < count, f"{key} is {name}"
        return torch.device(TYPE, number)

    for module in ("minillm.engine.placement", "minillm.teachers.open", "minillm.cli.generate"):
        monkeypatch.setattr(f"{module}.pick_device", pick)
    with pretended_devices() as places:
        yield places
