"""Answers to one prompt, side by side: they stand next to each other, so that the prompt is read once for all of them."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

READ_AHEAD = 0.25  # of the rows: prompts that are read at a time, and wait in caches of their own for rows that end

Extras = Sequence[Mapping[str, Tensor]]  # what each prompt shows beside its ids


def prompt_numbers(prompts: Sequence[list[int]], extras: Extras) -> list[int]:
    """For each prompt the place of the first one like it: with the same ids, and the very same extras."""
    first: dict[tuple, int] = {}
    keys = ((tuple(prompt), id(shown) if shown else None) for prompt, shown in zip(prompts, extras, strict=True))
    return [first.setdefault(key, place) for place, key in enumerate(keys)]


def whole_groups(numbers: Sequence[int], rows: int) -> int:
    """The answers, from the first on, that fit into so many rows without parting those to one prompt.

    `numbers` say which prompt each of them is to, those to one prompt next to each other. 0 where the first ones do not fit.
    """
    fit = min(rows, len(numbers))
    while 0 < fit < len(numbers) and numbers[fit] == numbers[fit - 1]:
        fit -= 1
    return fit


def in_batches(numbers: Sequence[int], size: int) -> list[tuple[int, int]]:
    """The ends of batches of at most `size` answers; those to one prompt are parted only where they are more than that."""
    ends, start = [], 0
    while start < len(numbers):
        end = start + (whole_groups(numbers[start:], size) or size)
        ends.append((start, min(end, len(numbers))))
        start = end
    return ends


def in_readings(numbers: Sequence[int], first: int, prompts: int) -> list[range]:
    """The answers from `first` on, those to so many prompts at a time; the last ones may be to fewer."""
    ends = [
        end for end in range(first + 1, len(numbers) + 1) if end == len(numbers) or numbers[end] != numbers[end - 1]
    ]
    chosen = [*ends[prompts - 1 :: prompts], *ends[-1:]]  # the last one perhaps twice
    return [range(start, end) for start, end in zip([first, *chosen], chosen, strict=False) if start < end]


def prompts_ahead(rows: int) -> int:
    """Prompts that are read at a time for so many rows, beside those that are in them."""
    return max(1, int(READ_AHEAD * rows))


def copies_of(numbers: Sequence[int]) -> tuple[list[int], Tensor | None]:
    """The places of the first answer to each prompt, and for each answer which of these is to its prompt, (B,) int64;
    None where no two answers are to one."""
    places = {number: place for place, number in reversed([*enumerate(numbers)])}
    firsts = sorted(places.values())
    if len(firsts) == len(numbers):
        return firsts, None
    row = {place: row for row, place in enumerate(firsts)}
    return firsts, torch.tensor([row[places[number]] for number in numbers])
