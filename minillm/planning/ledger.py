"""The bytes of all tensors alive, by part, at every allocation: of fake tensors here, of real ones in its test.

The part of a storage is the one named by the innermost `part(...)` around its allocation. A peak depends on how the
parts are sharded, so the ledger keeps every distinct moment, and `Timeline.peak` looks for the worst one afterwards.
"""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


@dataclass(frozen=True)
class Timeline:
    """The distinct moments of one phase: bytes alive, by part."""

    moments: np.ndarray  # (moments, parts) int64, bytes

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

    def most(self, part: str) -> int:
        """Return the most bytes of one part at any moment."""
        return int(self.moments[:, _INDEX[part]].max())


class Ledger(TorchDispatchMode):
    """A count of the bytes alive, active inside `with`; inside of a FakeTensorMode it sees the tensors that come out."""

    def __init__(self):
        super().__init__()
        self._part = "activations"
        self._live: dict[int, tuple[str, int]] = {}  # address of the storage -> (part, bytes)
        self._bytes = np.zeros(len(PARTS), dtype=np.int64)
        self._moments: list[np.ndarray] = []
        self._since: set[int] | None = None  # addresses, while a part of a pass is to be repeated

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
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

    def relabel(self, tensors: Iterable[Tensor], name: str) -> None:
        """Count the storages of these tensors as part `name` from now on."""
        for tensor in tensors:
            address = tensor.untyped_storage()._cdata
            if address in self._live:
                self._add(address, -1)
                self._live[address] = name, self._live[address][1]
                self._add(address, 1)
        self._moments.append(self._bytes.copy())

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
            part, size = self._live[address]
            if name in (None, part):
                self._add(address, -1)
                self._live[address] = part, size * times
                self._add(address, 1)
        self._since = None
        self._moments.append(self._bytes.copy())

    @property
    def total(self) -> int:
        """Bytes alive now."""
        return int(self._bytes.sum())

    @property
    def moment(self) -> int:
        """The present moment, for `most_since`."""
        return len(self._moments)

    def most_since(self, moment: int) -> int:
        """Return the most bytes alive at any moment after this one."""
        return max(int(after.sum()) for after in [*self._moments[moment:], self._bytes])

    def take(self) -> Timeline:
        """Return the moments since the last call, and forget them."""
        moments = np.unique(np.array([*self._moments, self._bytes]), axis=0)
        self._moments = []
        return Timeline(moments)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._live or not storage.nbytes():
            return
        self._live[address] = self._part, storage.nbytes()
        if self._since is not None:
            self._since.add(address)
        self._add(address, 1)
        self._moments.append(self._bytes.copy())
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
        part, size = self._live[address]
        self._bytes[_INDEX[part]] += sign * size
