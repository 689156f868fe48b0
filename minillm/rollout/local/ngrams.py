"""no_repeat_ngram_size: which tokens would complete an n-gram that a sequence already holds."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class NgramBan:
    """The n-grams of each prompt and its answer, kept up to date token by token (padding is not part of them)."""

    def __init__(self, size: int):
        self.size = size
        self.rows: dict[int, _Row] = {}  # by the row of the answers

    def begin(self, rows: Iterable[int], prompts: Iterable[Sequence[int]]) -> None:
        """Answers to these prompts begin in these rows."""
        for row, prompt in zip(rows, prompts, strict=True):
            self.rows[row] = _Row(self.size, prompt)

    def append(self, rows: Iterable[int], tokens: Sequence[int]) -> None:  # a token for each of these rows
        for row, token in zip(rows, tokens, strict=True):
            self.rows[row].append(token)

    def apply(self, rows: Iterable[int], logits: Tensor) -> Tensor:  # (rows, V padded), changed in place
        """-inf for every token that would repeat an n-gram; a row that would lose all its tokens keeps them."""
        for row, history in enumerate(self.rows[row] for row in rows):
            banned = history.banned()
            if banned:
                free = logits[row].clone()
                free[torch.tensor(banned, device=logits.device)] = -torch.inf
                if free.max() > -torch.inf:
                    logits[row] = free
        return logits


class _Row:
    def __init__(self, size: int, prompt: Sequence[int]):
        self.size = size
        self.tail: tuple[int, ...] = ()  # the last size - 1 tokens
        self.followers: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for token in prompt:
            self.append(token)

    def append(self, token: int) -> None:
        if len(self.tail) == self.size - 1:
            self.followers[self.tail].append(token)
        self.tail = (*self.tail, token)[-(self.size - 1) :] if self.size > 1 else ()

    def banned(self) -> list[int]:
        return self.followers.get(self.tail, []) if len(self.tail) == self.size - 1 else []
