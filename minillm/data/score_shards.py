"""The scores that two models give each document of a corpus, on disk: a file a piece, which is whole or not there.

A file holds, for the n documents of its piece, `tokens` (n,) int64, the predictions that the means are over, and
`teacher_nll` and `reference_nll` (n,) float64, mean negative log-likelihoods in nats a token, and `text_hash` (n,) uint64;
its metadata says which piece that is.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from minillm import UserError
from minillm.data.documents import Documents, Piece
from minillm.storage.atomic import clean, write_bytes, write_text

HEADER = "scored_by.json"


@dataclass(frozen=True)
class Scores:
    """Scores of n documents. The means of a document without a prediction are 0, and say nothing."""

    tokens: np.ndarray  # (n,) int64
    teacher_nll: np.ndarray  # (n,) float64
    reference_nll: np.ndarray  # (n,) float64
    text_hash: np.ndarray  # (n,) uint64, equal for equal texts

    @property
    def log_ratio(self) -> np.ndarray:  # (n,) float64
        """(1/T) log p(x)/p_ref(x) in nats a token, with p the teacher's."""
        with np.errstate(invalid="ignore"):  # of two infinite ones
            return self.reference_nll - self.teacher_nll

    @property
    def first_place(self) -> np.ndarray:  # (n,) int64
        """The place of the first document with the same text, its own where that is new."""
        _, first, inverse = np.unique(self.text_hash, return_index=True, return_inverse=True)
        return first[inverse]


def text_hash(text: str) -> int:
    """64 bits of the SHA-256 of a text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


class ScoreShards:
    """The files of one corpus in a folder that all ranks see. What must hold for all of them is in `scored_by.json`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def prepare(self, scored_by: Mapping[str, Any], documents: Documents) -> list[int]:
        """Make the folder ready, and find the pieces that have no scores yet. One process calls it.

        Raises UserError where there are scores by other models, or of other texts.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        clean(self.folder)
        header = self.folder / HEADER
        if not header.exists():
            write_text(header, json.dumps(scored_by, indent=1))
        before = json.loads(header.read_text(encoding="utf-8"))
        changed = [key for key in {**before, **scored_by} if before.get(key) != scored_by.get(key)]
        if changed:
            raise UserError(
                f"{self.folder} holds scores of documents under another {', '.join(changed)}; undo the change, or delete that "
                "folder to have the documents scored anew"
            )
        missing = []
        for piece in documents.pieces:
            if not self._path(piece.index).exists():
                missing.append(piece.index)
            elif self._metadata(piece.index) != _identity(piece):
                raise UserError(
                    f"{self._path(piece.index)} has the scores of other documents than {piece.first + 1:,} to "
                    f"{piece.first + piece.count:,} of data.corpus as it is now; restore the corpus, or delete {self.folder} "
                    "to have its documents scored anew"
                )
        return missing

    def write(self, piece: Piece, scores: Scores) -> None:
        """Put the scores of a piece on disk: once this returns they outlive a kill."""
        write_bytes(self._path(piece.index), save(vars(scores), metadata=_identity(piece)))

    def read(self, documents: Documents) -> Scores:
        """The scores of all documents, in order. Raises UserError for a file that is damaged.

        A repeated text has those of its first copy: beside other texts, the last bits of a sum come out differently.
        """
        types = {"tokens": np.int64, "teacher_nll": np.float64, "reference_nll": np.float64, "text_hash": np.uint64}
        whole = Scores(**{name: np.zeros(len(documents), dtype) for name, dtype in types.items()})
        for piece in documents.pieces:
            with self._open(piece.index) as file:
                for name, values in vars(whole).items():
                    values[piece.first : piece.first + piece.count] = file.get_tensor(name)
        first = whole.first_place
        return replace(whole, teacher_nll=whole.teacher_nll[first], reference_nll=whole.reference_nll[first])

    def _metadata(self, index: int) -> dict[str, str]:
        with self._open(index) as file:
            return file.metadata()

    def _open(self, index: int):
        try:
            return safe_open(self._path(index), framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self._path(index)} cannot be read ({error}); delete it to have its documents scored anew"
            ) from error

    def _path(self, index: int) -> Path:
        return self.folder / f"scores-{index:06d}.safetensors"


def _identity(piece: Piece) -> dict[str, str]:
    """The texts of a piece, as safetensors' metadata: of one key, for several would stand in any order."""
    return {"texts": json.dumps({"first": piece.first, "count": piece.count, "crc32": piece.crc})}
