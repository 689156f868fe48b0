"""Values among fake tensors: whole numbers are computed, and what comes of weights and pixels is a shape alone.

Architectures that cut pictures up by their sizes ask for numbers: how many patches a picture has, where its tokens stand, how
many features belong to each. All of these come from ids and sizes, which a plan knows, and never from pixels.
"""

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode

from minillm.planning.ledger import is_device_of_fake

# what fake tensors raise where a value is asked for that is not known
VALUES_NEEDED = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
NUMBERS = (torch.int64, torch.int32, torch.bool)
NUMBERED = ("arange", "linspace", "scalar_tensor")  # operations that make numbers, of whichever dtype
# elements that are computed at a time: a mask of all pairs of long texts has more, and nobody asks for its values
MOST = 2**26
_COMPARED = {torch.ops.aten.eq.Scalar: False, torch.ops.aten.ne.Scalar: True}
_INDEXED = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)


class KnownValues(TorchDispatchMode):
    """Inside of a FakeTensorMode that allows other inputs: keep tensors that are made of numbers real, with their values.

    Whatever meets a fake tensor is fake. A mask with values picks as many elements of a fake tensor as it is true for. No
    element of a fake tensor is equal to a number: pictures are not blank.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_device_of_fake(func, args):
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors = _given(args, kwargs)
        if any(isinstance(one, FakeTensor) for one in tensors):
            return _with_fake(func, args, kwargs)
        if not (_bound(tensors) <= MOST if tensors else _makes_numbers(func, kwargs)):
            return func(*args, **kwargs)
        with unset_fake_temporarily():
            return func(*args, **kwargs)


def _given(args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operation is given: in its schema they are arguments, or stand in a list that is one."""
    found = []
    for one in (*args, *kwargs.values()):
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, list | tuple):
            found += [inner for inner in one if isinstance(inner, Tensor)]
    return found


def _makes_numbers(func, kwargs: dict) -> bool:
    name, dtype = func.overloadpacket.__name__, kwargs.get("dtype")
    return name in NUMBERED or dtype in NUMBERS or name == "full" and dtype is None


def _bound(tensors: list[Tensor]) -> int:
    """The elements that these have together if they are broadcast; 0 for a single one, which is there already."""
    if len(tensors) < 2:
        return 0
    dimensions = max(one.dim() for one in tensors)
    shapes = [(1,) * (dimensions - one.dim()) + tuple(one.shape) for one in tensors]
    return math.prod(max(sizes) for sizes in zip(*shapes, strict=True))


def _with_fake(func, args: tuple, kwargs: dict):
    if func in _COMPARED:
        func(*args, **kwargs)  # its memory
        with unset_fake_temporarily():
            return torch.tensor(_COMPARED[func]).expand(args[0].shape)
    if func in _INDEXED:
        args = args[0], [index for one in args[1] for index in _places(one)], *args[2:]
    elif func._schema.is_mutable and isinstance(args[0], Tensor) and not isinstance(args[0], FakeTensor):
        return args[0]  # what is written into it is not known, and asked by nobody
    return func(*args, **kwargs)


def _places(index: Tensor | None) -> list[Tensor | None]:
    """An index without values, in the place of one that says by true and false what is taken."""
    if index is None or isinstance(index, FakeTensor) or index.dtype != torch.bool:
        return [index]
    with unset_fake_temporarily():
        taken = int(index.sum())
    return [*torch.empty(taken, index.dim(), dtype=torch.int64).unbind(1)]
