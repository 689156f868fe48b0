"""A teacher that has said everything beforehand: its rows are on disk, and of its weights the head alone is here."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from minillm import UserError
from minillm.config.needs import Ability
from minillm.losses import LMHead, TopK
from minillm.models.access import without_id
from minillm.models.batch import TokenBatch, TokenSequence
from minillm.models.device import moved
from minillm.storage.mapped_tensors import MappedTensors
from minillm.teachers.row_cache import ANSWERS, HEAD, RowCache, digest_of
from minillm.teachers.teacher import HiddenRows, TeacherRows, TopKRows


class CachedTeacher:
    """The teacher of a cache; the protocol is minillm.teachers.teacher.Teacher.

    Args:
        folder: of the cache.
        device: of the student, where rows are put, and the head.

    Raises UserError as RowCache does.
    """

    model = None

    def __init__(self, folder: Path, device: torch.device):
        self.cache, self.device = RowCache(folder), device
        self.answers_beside_pictures = False  # as minillm.models.families.answer_beside_pictures
        self.answers_file = folder / ANSWERS if (folder / ANSWERS).is_file() else None
        can = {"logprobs": self.cache.storage.rows == "hidden", "answer": self.answers_file is not None}
        self.abilities: frozenset[Ability] = frozenset({"single", *(name for name, able in can.items() if able)})

    @property
    def vocab_size(self) -> int:
        """Rows of its head."""
        return self.cache.described["vocab_size"]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end its answers."""
        return tuple(self.cache.described["end_ids"])

    @property
    def picture_id(self) -> int | None:
        """The id that stands for a picture, None for a teacher that sees none."""
        return self.cache.described["picture_id"]

    @property
    def largest_id(self) -> int | None:
        """The largest of its likeliest ids, None where it has hidden states."""
        return self.cache.described["error"].get("largest_id")

    @property
    def summary(self) -> tuple[str, str, str]:
        """(name, size, form) for the preflight table."""
        said = self.cache.described
        storage = said["storage"]
        kind = "hidden states" if storage["rows"] == "hidden" else f"{storage['size']} likeliest ids"
        size = f"{said['rows_total']:,} rows of {said['texts_total']:,} texts"
        return f"cached rows of {said['architecture']}", size, f"{kind} in {storage['dtype']}"

    def holds(self, sequence: TokenSequence) -> bool:
        """True where the cache has the rows of a text."""
        return self.cache.find(digest_of(sequence)) is not None

    def rows(self, batch: TokenBatch) -> TeacherRows:
        """The rows of the batch's texts, read from disk.

        Raises UserError for a text that the cache does not have, and for rows that are damaged.
        """
        found = []
        for sequence in batch.sequences:
            place = self.cache.find(digest_of(sequence))
            if place is None:
                raise UserError(
                    f"{self.cache.folder} has no rows of the text with key {sequence.key}, which the stage did not have when "
                    "it began; a cached teacher reads none that is made in training"
                )
            found.append(self.cache.read(place))
        parts = {name: torch.cat([one[name] for one in found]) for name in self.cache.storage.parts} if found else {}
        if not found or len(parts[self.cache.storage.parts[0]]) != len(batch.rows):
            raise ValueError(
                f"a batch with {len(batch.rows)} rows must be of sequences with as many tokens of response"
            )
        on_device = {name: moved(part, self.device) for name, part in parts.items()}
        dtype = self._head.weight.dtype if "logprobs" in self.abilities else torch.float32
        return self.rows_of(self.cache.storage.decode(on_device, dtype))

    def rows_of(self, parts: Mapping[str, Tensor]) -> TeacherRows:  # {"hidden": (N, H)} or {"ids", "logprobs": (N, k)}
        """Rows of decoded parts."""
        if "hidden" in parts:
            return HiddenRows(parts["hidden"], self)
        return TopKRows(TopK(parts["ids"], parts["logprobs"]))

    @contextmanager
    def head(self) -> Iterator[LMHead]:
        """The head, whole on every rank. Raises UserError for a cache of likeliest ids."""
        if "logprobs" not in self.abilities:
            raise UserError(f"{self.cache.folder} holds likeliest ids, and no hidden states that a head could read")
        yield without_id(self._head, self.picture_id if self.answers_beside_pictures else None)

    def close(self) -> None:
        self.cache.close()
        vars(self).pop("_head", None)

    @cached_property
    def _head(self) -> LMHead:
        return read_head(self.cache.folder / HEAD, self.device)


def head_bytes(head: LMHead) -> bytes:
    """A head as `read_head` reads it: on its own, whatever it is tied to."""
    tensors = {"weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = {"logit_scale": head.logit_scale, "softcap": head.softcap}
    return save(tensors, metadata={"head": json.dumps(said)})


def read_head(path: Path, device: torch.device) -> LMHead:
    """The head of a file that holds `head_bytes`."""
    tensors = load_file(path, device=str(device))
    return LMHead(tensors["weight"], tensors.get("bias"), **json.loads(MappedTensors(path).metadata["head"]))
