"""The parts of what is saved, and copies of them in the host's memory, which may be written while the originals change."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class SavedPart:
    """One part of a folder. All ranks collect it together; each writes files of its own, or none."""

    collect: Callable[[], Any]  # the state of the moment: the tensors themselves
    write: Callable[[Any, Path], None]  # that state, into a folder
    fresh: bool = False  # the tensors of a state are nobody else's, and on the host

    def copied(self) -> "SavedPart":
        """The same part as it is now, whatever becomes of the original."""
        state = copied_to_host(self.collect(), tensors=not self.fresh)
        return SavedPart(lambda: state, self.write)

    def save(self, folder: Path) -> None:
        """Write the state of the moment."""
        self.write(self.collect(), folder)


def copied_to_host(state: Any, *, tensors: bool = True) -> Any:
    """A copy of nested dicts, lists, tuples, tensors and plain values that has nothing in common with the original.

    Tensors come to the host's memory. What is one tensor under two names, as tied weights are, stays one. With `tensors`
    false they are taken as they are.
    """
    return _copied(state, {} if tensors else None)


def _copied(state: Any, known: dict[tuple, Tensor] | None) -> Any:
    if isinstance(state, Tensor):
        return state if known is None else _copied_tensor(state.detach(), known)
    if isinstance(state, Mapping):
        return {key: _copied(value, known) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value, known) for value in state)
    return copy.deepcopy(state)


def _copied_tensor(tensor: Tensor, known: dict[tuple, Tensor]) -> Tensor:
    place = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
    if not tensor.numel():  # all of them have the same address
        return tensor.to("cpu", copy=True)
    if place not in known:
        known[place] = tensor.to("cpu", copy=True)
    return known[place]
