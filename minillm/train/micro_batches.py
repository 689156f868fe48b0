"""The micro-batches of a step: items of like lengths share one, so that little of it is padding."""

from collections.abc import Sequence
from typing import TypeVar

from minillm.methods.protocol import Item

AnyItem = TypeVar("AnyItem", bound=Item)


def cut_step(items: Sequence[AnyItem], size: int, *, by_length: bool) -> list[list[AnyItem]]:
    """Parts of `size` items of a step, the last of what is left over.

    Where `by_length` says so the longest come first: if memory is short, a step says so at its beginning. Items that
    share one micro-batch, or have one each, stay as they are, and so do items of equal lengths.
    """
    ordered = list(items)
    if by_length and 1 < size < len(ordered):
        ordered.sort(key=lambda item: item.width, reverse=True)
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]
