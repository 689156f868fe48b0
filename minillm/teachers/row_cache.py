"""A teacher's rows on disk, found by the text that they belong to.

cache.json               the teacher, the texts, the form of the rows and its error, fingerprints, and the size of every shard
index.safetensors        n texts in the order of their digests: `leading` and `trailing` (n,) uint64, the halves of the
                         digest, `shard` (n,) int32, `first` (n,) int64, the first of its rows there, `rows` (n,) int32,
                         and `crc32` (n,) uint32 of their bytes
rows-NNNNNN.safetensors  hidden (N, H), with int8 scale (N,); or ids and logprobs (N, k): texts one after the other
head.safetensors         the LM head that turns hidden states into logits
tokenizer/               the teacher's
answers.jsonl            its answers to the prompts, where it has written any
manifest.json            size and SHA-256 of all of these

A text is known by its digest: of its ids, where the response begins, and what it shows beside them. So a cache serves
whatever data holds the text, in any order, and grows by new texts alone.
"""

import hashlib
import json
import struct
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from minillm import UserError
from minillm.config.paths import CACHE, STAGE, cache_folder, expand
from minillm.distributed import collectives
from minillm.models.batch import TokenSequence
from minillm.storage.manifest import find_damage
from minillm.storage.mapped_tensors import MappedTensors
from minillm.teachers.row_storage import Parts, RowStorage

INDEX, HEAD, TOKENIZER, ANSWERS = "index.safetensors", "head.safetensors", "tokenizer", "answers.jsonl"
FORMAT = 2
OPEN_SHARDS = 128  # maps that are held at a time: each takes a file descriptor
ANEW = "delete it, from the folder `written` too, and run `minillm cache` again: it writes what is missing"


def shard_name(number: int) -> str:
    """rows-000012.safetensors."""
    return f"rows-{number:06d}.safetensors"


def digest_of(sequence: TokenSequence) -> bytes:  # 16 bytes
    """The digest of a text as the teacher reads it: equal for equal prompts with equal responses that show the same."""
    sequence = sequence.read_by_teacher()
    found = hashlib.blake2b(struct.pack("<q", len(sequence.prompt)), digest_size=16)
    found.update(np.asarray([*sequence.prompt, *sequence.response], dtype="<i8").tobytes())
    for name, extra in sorted(sequence.extras.items()):
        found.update(f"{name} {extra.dtype} {tuple(extra.shape)}".encode())
        found.update(extra.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.digest()


def checksum(parts: Mapping[str, Tensor], names: tuple[str, ...]) -> int:
    """CRC-32 of the bytes of a text's rows."""
    crc = 0
    for name in names:
        crc = zlib.crc32(parts[name].contiguous().reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


class Place(NamedTuple):
    """The place of a text in the shards."""

    shard: int
    first: int  # row
    rows: int
    crc32: int


class RowCache:
    """The cache in a folder, opened to be read. What is read of it is checked, row by row.

    Raises UserError for a folder without a cache, one of another version, and one with a file that is cut off or altered;
    of the shards, whose bytes are checked as they are read, only the sizes are looked at here.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        reads = collectives.rank() == 0
        damage = find_damage(folder, contents=lambda name: reads and not name.startswith("rows-"))
        if damage is not None:
            raise UserError(f"{folder} is not whole ({damage}). Put the file back as it was, or {ANEW}")
        self.described: dict[str, Any] = json.loads((folder / CACHE).read_text(encoding="utf-8"))
        if self.described.get("format") != FORMAT:
            raise UserError(f"{folder} was written by another version (format {self.described.get('format')}); {ANEW}")
        self.storage = RowStorage(**self.described["storage"])
        index = MappedTensors(folder / INDEX)
        self._leading, self._trailing = index.array("leading"), index.array("trailing")
        self._columns = [index.array(name) for name in Place._fields]
        self._shards: OrderedDict[int, MappedTensors] = OrderedDict()

    def __len__(self) -> int:
        """The number of texts."""
        return len(self._leading)

    def find(self, digest: bytes) -> Place | None:
        """The place of a text's rows, None where the cache does not have it."""
        leading, trailing = np.frombuffer(digest, "<u8")
        place = int(np.searchsorted(self._leading, leading))
        while place < len(self._leading) and self._leading[place] == leading:
            if self._trailing[place] == trailing:
                return Place(*(int(column[place]) for column in self._columns))
            place += 1
        return None

    def read(self, place: Place) -> Parts:  # (rows, ...) each
        """The stored rows of a text. Raises UserError where they are not what was written."""
        shard = self._shard(place.shard)
        parts = {name: shard.rows(name, place.first, place.rows) for name in self.storage.parts}
        if checksum(parts, self.storage.parts) != place.crc32:
            raise UserError(
                f"{self.folder / shard_name(place.shard)} was altered: rows {place.first:,} to "
                f"{place.first + place.rows - 1:,} are not those that were written. Put the file back as it was, or {ANEW}"
            )
        return parts

    def close(self) -> None:
        """Give back the maps."""
        self._shards.clear()

    def _shard(self, number: int) -> MappedTensors:
        if number in self._shards:
            self._shards.move_to_end(number)
            return self._shards[number]
        path = self.folder / shard_name(number)
        try:
            self._shards[number] = MappedTensors(path)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}). Put the file back as it was, or {ANEW}") from error
        if len(self._shards) > OPEN_SHARDS:
            self._shards.popitem(last=False)
        return self._shards[number]


def find_cache(text: str, output_dir: Path) -> Path:
    """The folder of a cached teacher's path: stage:NAME, its own, or that of the run that wrote nothing else.

    Raises UserError where there is none.
    """
    if text.startswith(STAGE):
        folder = Path(output_dir) / "stages" / text.removeprefix(STAGE)
        if not (folder / CACHE).is_file():
            raise UserError(f"{text}: {folder} holds no cache; the stage has not finished")
        return folder
    folder = cache_folder(expand(text))
    if folder is None:
        raise UserError(f"{text} is no cache: expected a folder with a {CACHE}, as `minillm cache` writes it")
    return folder
