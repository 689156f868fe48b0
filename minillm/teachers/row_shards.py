"""The writing of a teacher's rows: shards that are whole or not there, dealt over the ranks, and the cache made of them.

A shard holds the rows of texts that stand next to each other in the data, as many as its size allows. Which texts those are
depends on the data and on what was finished before, and not on ranks or kills: an interrupted writing goes on to the very
same files. Texts that are new since the last finished writing get shards of their own.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_arrays
from safetensors.torch import save
from torch import Tensor

from minillm import UserError
from minillm.config.paths import CACHE
from minillm.models.batch import TokenSequence
from minillm.storage.atomic import clean, write_bytes, write_text
from minillm.storage.mapped_tensors import MappedTensors
from minillm.teachers.row_cache import FORMAT, INDEX, Parts, Place, checksum, digest_of, shard_name
from minillm.teachers.row_storage import RowStorage, StorageError

HEADER = "written_by.json"
Digest = tuple[int, int]  # the halves of 16 bytes


@dataclass(frozen=True)
class Piece:
    """The texts of one shard."""

    number: int  # of the shard
    texts: list[int]  # their places among those that were given
    digests: np.ndarray  # (n, 2) uint64


class RowShards:
    """The shards of one cache in a folder that all ranks see, while it is written."""

    def __init__(self, folder: Path, storage: RowStorage, *, shard_bytes: int):
        self.folder, self.storage = folder, storage
        self.shard_rows = max(1, shard_bytes // storage.bytes_per_row)

    def prepare(self, written_by: Mapping[str, Any]) -> list[int]:
        """Make the folder ready; the numbers of the shards that an earlier writing has finished. One process calls it.

        Raises UserError where there are rows of another teacher, or in another form.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        clean(self.folder)
        written_by = json.loads(json.dumps(written_by))
        if not (self.folder / HEADER).exists():
            self._write_header(written_by, [])
        header = self._header()
        before = header["written_by"]
        changed = [key for key in {**before, **written_by} if before.get(key) != written_by.get(key)]
        if changed:
            raise UserError(
                f"{self.folder} holds rows that were written with another {', '.join(changed)}; undo the change, or delete "
                "that folder to have the rows written anew"
            )
        return [number for number in header["finished"] if self._path(number).exists()]

    def pieces(self, texts: Sequence[TokenSequence], finished: Sequence[int]) -> list[Piece]:
        """The shards to come: of every text that no finished shard has, once, in the order of the data."""
        known = {one for number in finished for one in _pairs(self._digests(number))}
        found: list[tuple[list[int], list[Digest]]] = []
        room = 0
        for place, text in enumerate(texts):
            digest = tuple(np.frombuffer(digest_of(text), "<u8").tolist())
            if digest in known or not text.response:
                continue
            known.add(digest)
            if not found or len(text.response) > room:
                found.append(([], []))
                room = self.shard_rows
            room -= len(text.response)
            found[-1][0].append(place)
            found[-1][1].append(digest)
        first = max(self._header()["finished"], default=-1) + 1
        return [
            Piece(first + index, places, np.array(digests, np.uint64).reshape(-1, 2))
            for index, (places, digests) in enumerate(found)
        ]

    def is_written(self, piece: Piece) -> bool:
        """True where the shard is there; one of other texts, of data that has changed since, is deleted."""
        if not self._path(piece.number).exists():
            return False
        if np.array_equal(self._digests(piece.number), piece.digests):
            return True
        self._path(piece.number).unlink()
        return False

    def write(self, piece: Piece, rows: Sequence[Parts], error: StorageError) -> None:  # {part: (T, ...)} of every text
        """Put the rows of a piece on disk: once this returns they outlive a kill."""
        tensors: dict[str, Tensor] = {
            name: torch.cat([one[name] for one in rows]).contiguous() for name in self.storage.parts
        }
        tensors["digest"] = torch.from_numpy(piece.digests.view(np.int64))
        tensors["rows"] = torch.tensor([len(one[self.storage.parts[0]]) for one in rows])
        tensors["crc32"] = torch.tensor([checksum(one, self.storage.parts) for one in rows])
        metadata = {"error": json.dumps(error.sums, sort_keys=True)}
        write_bytes(self._path(piece.number), save(tensors, metadata=metadata))

    def finish(self, finished: Sequence[int], pieces: Sequence[Piece]) -> list[int]:
        """The numbers of all shards, when all of them are written; from now on they stay as they are."""
        numbers = [*finished, *(piece.number for piece in pieces)]
        self._write_header(self._header()["written_by"], numbers)
        return numbers

    def publish(self, numbers: Sequence[int], folder: Path, described: Mapping[str, Any]) -> None:
        """Put shards, index and cache.json into a folder. The shards are links where the disk knows any, else copies."""
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("leading", "trailing", *Place._fields)}
        error, sizes = StorageError(), {}
        for number in numbers:
            shard = self._open(number)
            rows, digests = shard.array("rows"), shard.array("digest").view(np.uint64)
            values = (
                digests[:, 0],
                digests[:, 1],
                np.full(len(rows), number),
                rows.cumsum() - rows,
                rows,
                shard.array("crc32"),
            )
            for column, value in zip(columns.values(), values, strict=True):
                column.append(value)
            error.merge(StorageError(json.loads(shard.metadata["error"])))
            name = shard_name(number)
            sizes[name] = {"bytes": self._path(number).stat().st_size, "texts": len(rows), "rows": int(rows.sum())}
            _link(self._path(number), folder / name)
        kinds = (np.uint64, np.uint64, np.int32, np.int64, np.int32, np.uint32)
        joined = {
            name: np.concatenate([np.empty(0, kind), *parts]).astype(kind)
            for (name, parts), kind in zip(columns.items(), kinds, strict=True)
        }
        order = np.lexsort((joined["trailing"], joined["leading"]))
        index = {name: values[order] for name, values in joined.items()}
        (folder / INDEX).write_bytes(save_arrays(index))  # `save_file` lets nobody else read it
        described = {
            "format": FORMAT,
            **described,
            "storage": vars(self.storage),
            "texts_total": len(order),
            "rows_total": int(joined["rows"].sum()),
            "bytes_per_row": self.storage.bytes_per_row,
            "error": error.described(),
            "shards": sizes,
        }
        (folder / CACHE).write_text(json.dumps(described, indent=1), encoding="utf-8")

    def _digests(self, number: int) -> np.ndarray:  # (n, 2) uint64
        return np.array(self._open(number).array("digest").view(np.uint64))

    def _open(self, number: int) -> MappedTensors:
        try:
            return MappedTensors(self._path(number))
        except (OSError, ValueError, KeyError) as error:
            raise UserError(
                f"{self._path(number)} cannot be read ({error}); delete it to have it written anew"
            ) from error

    def _header(self) -> dict[str, Any]:
        return json.loads((self.folder / HEADER).read_text(encoding="utf-8"))

    def _write_header(self, written_by: Mapping[str, Any], finished: Sequence[int]) -> None:
        write_text(self.folder / HEADER, json.dumps({"written_by": written_by, "finished": list(finished)}, indent=1))

    def _path(self, number: int) -> Path:
        return self.folder / shard_name(number)


def _pairs(digests: np.ndarray) -> list[Digest]:  # (n, 2)
    return [tuple(one) for one in digests.tolist()]


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk without hard links
        shutil.copyfile(source, target)
