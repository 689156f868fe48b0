"""Token sequences side by side, and which position predicts what."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from minillm import UserError
from minillm.models.device import moved


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and the response whose tokens are predicted after it.

    `extras` are what else the model's forward pass takes for this sequence, by the names of its arguments: pixel values,
    image sizes. Each has a leading dimension, along which those of a batch are joined; where they differ in another
    dimension, which is the number of parts or the size of pictures, the smaller ones are padded with zeros at the end.
    """

    prompt: list[int]
    response: list[int]  # with its EOS if it ended
    key: int = 0  # of the prompt: its place in the data
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    weight: float = 1.0  # of its rows in a loss that reads it
    group: int = 0  # sequences of one group belong together: a pair of answers, the tasks of a record
    teacher_prompt: list[int] | None = None  # in the place of `prompt` for the teacher; None: it reads the same one
    judge: str | None = None  # the name of its teacher, where every record has one of several

    def read_by_teacher(self) -> "TokenSequence":
        """The text as the teacher reads it: its own prompt, and the very same response."""
        if self.teacher_prompt is None:
            return self
        return replace(self, prompt=self.teacher_prompt, teacher_prompt=None)

    @property
    def width(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class TokenBatch:
    """The inputs of a model's forward, and the N predictions that count.

    Predictions are named by their row, so that EOS used as padding can never hide a real EOS: a row counts because
    it stands in `rows`, not because of the id it holds. Rows run over the responses in order, token by token. A term that
    scores several ids at every position repeats them, all of them at a time: then N is a multiple of `tokens`.
    """

    input_ids: Tensor  # (B, L) int64, right-padded; the last response token is predicted, never fed
    attention_mask: Tensor  # (B, L) int64, 1 on real tokens
    position_ids: Tensor  # (B, L) int64
    rows: Tensor  # (N,) int64 indices into the flattened (B * L) positions
    labels: Tensor  # (N,) int64, the id that each row predicts
    lengths: tuple[int, ...]  # response tokens of each sequence
    widths: tuple[int, ...]  # tokens fed of each sequence
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # of all sequences, for the forward pass
    sequences: tuple[TokenSequence, ...] = ()  # that it was made of, for a teacher that knows them by their texts
    pad_id: int = 0  # stands beside the shorter sequences

    @property
    def tokens(self) -> int:
        """Response tokens of all sequences."""
        return sum(self.lengths)

    def to(self, device: torch.device | str) -> "TokenBatch":
        names = ("input_ids", "attention_mask", "position_ids", "rows", "labels")
        parts = {name: moved(getattr(self, name), device) for name in names}
        return replace(self, **parts, extras={name: moved(tensor, device) for name, tensor in self.extras.items()})

    def read_by_teacher(self) -> "TokenBatch":
        """The batch as the teacher reads it: after its own prompts the same responses, so that row t of the one predicts the
        very token that row t of the other does, wherever it stands.

        Raises ValueError where the rows are not those of the responses, and a prompt of the teacher's own has no such rows.
        """
        if all(sequence.teacher_prompt is None for sequence in self.sequences):
            return self
        if len(self.rows) != self.tokens:
            raise ValueError(
                f"{len(self.rows)} rows of {self.tokens} tokens of response: a teacher with prompts of its own has rows of "
                "responses alone"
            )
        read = collate([sequence.read_by_teacher() for sequence in self.sequences], self.pad_id)
        return read.to(self.input_ids.device)

    def split(self, vector: Tensor) -> list[Tensor]:  # (N, ...) -> one (T, ...) a sequence
        """Per-sequence views of a per-row tensor."""
        return list(vector.split(self.lengths))

    def prompt_mask(self) -> Tensor:  # (B, L) bool
        """The tokens of the prompts."""
        width = self.input_ids.shape[1]
        prompts = self.attention_mask.sum(1)  # with the fed part of the answers
        fed = torch.tensor([max(length - 1, 0) for length in self.lengths], device=prompts.device)
        return torch.arange(width, device=prompts.device) < (prompts - fed)[:, None]


def collate(sequences: Iterable[TokenSequence], pad_id: int) -> TokenBatch:
    """Right-pad prompt + response and mark the positions that predict the response.

    Raises UserError for an empty prompt (nothing would predict the first response token).
    """
    sequences = list(sequences)
    if any(not sequence.prompt for sequence in sequences):
        raise UserError("a prompt has no tokens, so nothing predicts its first response token; add a BOS")
    fed = [sequence.prompt + sequence.response[:-1] for sequence in sequences]
    width = max((len(ids) for ids in fed), default=0)
    input_ids = torch.full((len(fed), width), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    rows, labels = [], []
    for row, (ids, sequence) in enumerate(zip(fed, sequences, strict=True)):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        first = row * width + len(sequence.prompt) - 1
        rows.extend(range(first, first + len(sequence.response)))
        labels.extend(sequence.response)
    return TokenBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=torch.arange(width).expand(len(fed), width),
        rows=torch.tensor(rows, dtype=torch.int64),
        labels=torch.tensor(labels, dtype=torch.int64),
        lengths=tuple(len(sequence.response) for sequence in sequences),
        widths=tuple(map(len, fed)),
        extras=join_extras([sequence.extras for sequence in sequences]),
        sequences=tuple(sequences),
        pad_id=pad_id,
    )


def join_extras(extras: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The extras of a batch: those of its sequences one after the other, by name."""
    parts: dict[str, list[Tensor]] = {}
    for one in extras:
        for name, tensor in one.items():
            parts.setdefault(name, []).append(tensor)
    return {name: _cat_padded(tensors) for name, tensors in parts.items()}


def _cat_padded(tensors: list[Tensor]) -> Tensor:  # (any, ...) each
    sizes = [max(of_one) for of_one in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    if all(list(tensor.shape[1:]) == sizes for tensor in tensors):
        return torch.cat(tensors)
    joined = tensors[0].new_zeros((sum(map(len, tensors)), *sizes))
    first = 0
    for tensor in tensors:
        inside = tuple(slice(size) for size in tensor.shape[1:])
        joined[(slice(first, first + len(tensor)), *inside)] = tensor
        first += len(tensor)
    return joined
