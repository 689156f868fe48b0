"""The bytes of all tensors alive, by part, at every allocation: of fake tensors here, of real ones in its test.

The part of a storage is the one named by the innermost `part(...)` around its allocation, and its device the one named by
the innermost `at(...)`: each device has moments of its own. A peak depends on how the
parts are sharded, so the ledger keeps every distinct moment, and `Timeline.peak` looks for the worst one afterwards.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.planning.places import HOME

PARTS = (
    "student weights",
    "teacher weights",
    "gradients",
    "optimizer states",
    "fp32 master weights",
    "activations",
    "student KV cache",
    "teacher KV cache",
    "sampling buffers",
    "teacher hidden states",
    "rollout buffer",
    "checkpoint copy",
    "loss buffers",
    "gathered weights",
    "communication buckets",
)
_INDEX = {name: place for place, name in enumerate(PARTS)}


def is_device_of_fake(func, args: tuple) -> bool:
    """True for the question where a fake tensor is: more than half of what is dispatched, and no operation."""
    return func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor)


@dataclass(frozen=True)
class Timeline:
    """The distinct moments of one phase: bytes alive, by part."""

    moments: np.ndarray  # (moments, parts) int64, bytes on the student's device
    beside: Mapping[str, np.ndarray] = field(default_factory=dict)  # of other devices likewise, by their names

    def peak(self, factors: Mapping[str, float], added: Mapping[str, int]) -> dict[str, int]:
        """Return the bytes of each part at the worst moment.

        Args:
            factors: what each part is multiplied by, 1 where nothing is said.
            added: bytes added to each part afterwards.
        """
        scale = np.array([factors.get(name, 1.0) for name in PARTS])
        worst = int((self.moments @ scale).argmax())
        return {
            name: int(self.moments[worst, place] * scale[place]) + int(added.get(name, 0))
            for name, place in _INDEX.items()
        }

    def peak_beside(self, place: str) -> dict[str, int]:
        """Return the bytes of each part at the worst moment of another device; none where nothing was there."""
        moments = self.beside.get(place)
        if moments is None:
            return dict.fromkeys(PARTS, 0)
        return dict(zip(PARTS, map(int, moments[int(moments.sum(1).argmax())]), strict=True))

    def most(self, part: str) -> int:
        """Return the most bytes of one part at any moment."""
        return int(self.moments[:, _INDEX[part]].max())


class Ledger(TorchDispatchMode):
    """A count of the bytes alive, active inside `with`; inside of a FakeTensorMode it sees the tensors that come out."""

    def __init__(self):
        super().__init__()
        self._part, self._place = "activations", HOME
        self._live: dict[int, tuple[str, str, int]] = {}  # address of the storage -> (place, part, bytes)
        self._bytes: dict[str, np.ndarray] = {}  # place -> (parts,)
        self._moments: dict[str, list[np.ndarray]] = {}  # place -> (parts,) each
        self._begin(HOME)
        self._since: set[int] | None = None  # addresses, while a part of a pass is to be repeated

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if is_device_of_fake(func, args):
            return args[0].fake_device
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what is allocated inside as part `name`."""
        before, self._part = self._part, name
        try:
            yield
        finally:
            self._part = before

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Count what is allocated inside on another device than the student's, or on that again (HOME)."""
        before, self._place = self._place, place
        self._begin(place)
        try:
            yield
        finally:
            self._place = before

    def relabel(self, tensors: Iterable[Tensor], name: str) -> None:
        """Count the storages of these tensors as part `name` from now on."""
        for tensor in tensors:
            address = tensor.untyped_storage()._cdata
            if address in self._live:
                self._add(address, -1)
                place, _, size = self._live[address]
                self._live[address] = place, name, size
                self._add(address, 1)
        self._mark()

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of these tensors no longer: they are there when others of this ledger are not."""
        for tensor in tensors:
            self._free(tensor.untyped_storage()._cdata)

    def begin_repeated(self, *tensors: Tensor) -> None:
        """Remember these tensors and what is allocated from now on, for `repeat`."""
        self._since = {one.untyped_storage()._cdata for one in tensors} & self._live.keys()

    def repeat(self, times: int, *, without: Tensor | None = None, name: str | None = None) -> None:
        """Count what has been remembered and is still alive `times` times, until it is freed.

        Args:
            without: a tensor that is counted once all the same.
            name: the only part that is repeated; None: all of them.
        """
        once = None if without is None else without.untyped_storage()._cdata
        for address in (self._since or set()) - {once}:
            place, part, size = self._live[address]
            if name in (None, part):
                self._add(address, -1)
                self._live[address] = place, part, size * times
                self._add(address, 1)
        self._since = None
        self._mark()

    @property
    def total(self) -> int:
        """Bytes alive now, on the present device."""
        return int(self._bytes[self._place].sum())

    @property
    def moment(self) -> int:
        """The present moment, for `most_since`."""
        return len(self._moments[self._place])

    def most_since(self, moment: int) -> int:
        """Return the most bytes alive at any moment after this one, on the present device."""
        place = self._place
        return max(int(after.sum()) for after in [*self._moments[place][moment:], self._bytes[place]])

    def take(self) -> Timeline:
        """Return the moments since the last call, and forget them."""
        found = {place: np.unique(np.array([*self._moments[place], now]), axis=0) for place, now in self._bytes.items()}
        self._moments = {place: [] for place in self._bytes}
        return Timeline(found.pop(HOME), found)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live or not storage.nbytes():
            return
        self._live[address] = self._place, self._part, storage.nbytes()
        if self._since is not None:
            self._since.add(address)
        self._add(address, 1)
        self._mark()
        # a storage keeps its Python object as long as it lives, whichever tensors come and go
        weakref.finalize(storage, self._free, address).atexit = False

    def _free(self, address: int) -> None:
        if address not in self._live:  # forgotten before
            return
        self._add(address, -1)
        del self._live[address]
        if self._since is not None:
            self._since.discard(address)

    def _add(self, address: int, sign: int) -> None:
        place, part, size = self._live[address]
        self._bytes[place][_INDEX[part]] += sign * size

    def _begin(self, place: str) -> None:
        if place not in self._bytes:
            self._bytes[place], self._moments[place] = np.zeros(len(PARTS), dtype=np.int64), []

    def _mark(self) -> None:
        for place, now in self._bytes.items():
            self._moments[place].append(now.copy())
