"""Plain text document by document, for those who judge whole ones: read anew at each pass, a piece in memory at a time."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from minillm.config.data import Corpus as CorpusConfig
from minillm.data.pydoc import pydoc_documents
from minillm.data.sources import DataError, Place, read_hf, read_texts, texts_of

PIECE_DOCUMENTS, PIECE_CHARACTERS = 512, 2**22  # a piece ends when it has one or the other


def read_documents(config: CorpusConfig) -> Iterator[tuple[Place, str]]:
    """(where, text) of the documents of a corpus, in order, less those that `skip` and `limit` leave out.

    Raises DataError as the readers of minillm.data.sources do.
    """
    if config.type == "pydoc":
        return islice(((Place("pydoc"), text) for text in pydoc_documents()), config.limit)
    if config.type == "hf":
        found = texts_of(read_hf(config.path, config.name, config.split, streaming=True))
    else:
        found = read_texts(config.path)
    end = None if config.limit is None else config.skip + config.limit
    return islice(found, config.skip, end)


@dataclass(frozen=True)
class Piece:
    """Some neighbouring documents: a unit of work, the same whoever does it."""

    index: int
    first: int  # document
    count: int
    crc: int  # CRC-32 of the texts


@dataclass(frozen=True)
class Documents:
    """A corpus that has been read to its end once, in pieces of PIECE_DOCUMENTS documents or PIECE_CHARACTERS characters."""

    read: Callable[[], Iterator[tuple[Place, str]]]  # from the first document on
    pieces: tuple[Piece, ...]

    def __len__(self) -> int:
        return self.pieces[-1].first + self.pieces[-1].count

    def read_pieces(self, wanted: Callable[[int], bool]) -> Iterator[tuple[Piece, list[tuple[Place, str]]]]:
        """The wanted pieces with their documents, in order; of the others nothing is kept.

        Raises DataError where a piece is not what it was at first.
        """
        documents = self.read()
        for piece in self.pieces:
            if not wanted(piece.index):
                next(islice(documents, piece.count, piece.count), None)
                continue
            found = list(islice(documents, piece.count))
            crc = 0
            for _, text in found:
                crc = _crc(text, crc)
            if (len(found), crc) != (piece.count, piece.crc):
                raise DataError(
                    f"data.corpus: documents {piece.first + 1:,} to {piece.first + piece.count:,} have changed since this run "
                    "began; leave the files alone while they are read"
                )
            yield piece, found


def survey_documents(config: CorpusConfig) -> Documents:
    """Read a corpus once, and divide it. Raises DataError where there is no document, or one that cannot be used."""
    pieces: list[Piece] = []
    first = count = characters = crc = 0
    for _, text in read_documents(config):
        count, characters, crc = count + 1, characters + len(text), _crc(text, crc)
        if count == PIECE_DOCUMENTS or characters >= PIECE_CHARACTERS:
            pieces.append(Piece(len(pieces), first, count, crc))
            first, count, characters, crc = first + count, 0, 0, 0
    if count:
        pieces.append(Piece(len(pieces), first, count, crc))
    if not pieces:
        raise DataError("data.corpus: there is no document; look at its path, skip and limit")
    return Documents(lambda: read_documents(config), tuple(pieces))


def _crc(text: str, before: int) -> int:
    # a byte that no text has in UTF-8 tells "ab", "c" from "a", "bc"
    return zlib.crc32(text.encode("utf-8", "surrogatepass") + b"\xff", before)
