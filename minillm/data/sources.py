"""Records from files and datasets, each with the place that it came from, for errors that name it."""

import errno
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minillm import UserError
from minillm.config.paths import expand, matching_files

if TYPE_CHECKING:
    from datasets import Dataset

Record = tuple["Place", dict[str, Any]]  # (where it stands, its fields)

# errno of OSErrors about what a folder does not have; the libraries below give many of theirs none
_OF_THE_FOLDER = (None, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class Place(str):
    """The place of a record, for errors; relative paths in it count from `folder`. `source` is what it comes from: its
    file or dataset."""

    folder: Path
    source: str

    def __new__(cls, text: str, folder: Path = Path("."), source: str | None = None):
        place = super().__new__(cls, text)
        place.folder, place.source = folder, text if source is None else source
        return place


class DataError(UserError):
    """A record or a file that cannot be used. The message names it."""


def find_files(pattern: str) -> list[Path]:
    """The files that a path or glob names, sorted. Raises DataError where there is none."""
    files = matching_files(expand(pattern))
    if not files:
        raise DataError(f"{pattern}: no such file")
    return files


def read_jsonl(pattern: str) -> Iterator[Record]:
    """JSON objects, one per line, of plain or gzipped files. Blank lines are passed over.

    Raises DataError, which names file and line, for a line that is no JSON object.
    """
    for path in find_files(pattern):
        for number, line in enumerate(read_lines(path), 1):
            if not line.strip():
                continue
            where = Place(f"{path}:{number}", path.parent, str(path))
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # JSON's and UTF-8's
                raise DataError(f"{where}: not JSON in UTF-8 ({error}); expected one object per line") from None
            except RecursionError:
                raise DataError(
                    f"{where}: lists or objects nested too deeply; expected the fields of a record"
                ) from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
            yield where, record


def read_parquet(pattern: str) -> Iterator[Record]:
    """Rows of Parquet files. Raises DataError, which names the file, for one that is damaged or of another kind."""
    from datasets import Dataset

    for path in find_files(pattern):
        with _reading(lambda reason, path=path: f"{path}: not a whole Parquet file ({reason})"):
            for number, record in enumerate(_undecoded(Dataset.from_parquet(str(path)))):
                yield Place(f"{path}, row {number}", path.parent, str(path)), record


def read_hf(path: str, name: str | None, split: str, *, streaming: bool = False) -> Iterator[Record]:
    """Rows of a dataset: of a folder that save_to_disk wrote, a folder of files that `datasets` knows, or a hub name.

    Args:
        path: the folder or hub name.
        name: the configuration of a hub dataset.
        split: the part of the dataset.
        streaming: fetch of a hub dataset only the rows that are read.

    Raises DataError, which names the dataset, where it is not there, has no such part, or cannot be read.
    """
    folder = Path(expand(path))
    with _reading(lambda reason: _not_read(path, folder, split, reason)):
        if _is_saved(folder):
            dataset = _saved(path, folder, split)
        else:
            from datasets import load_dataset

            dataset = load_dataset(str(folder) if folder.exists() else path, name, split=split, streaming=streaming)
        for number, record in enumerate(_undecoded(dataset)):
            yield Place(f"{path} ({split}), row {number}", folder, f"{path} ({split})"), record


def _undecoded(dataset: "Dataset") -> "Dataset":
    """The dataset with its pictures as they are stored, so that a broken one is found with the record that shows it."""
    from datasets import Image, List

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def _saved(path: str, folder: Path, split: str) -> "Dataset":
    """The dataset that save_to_disk wrote, or its part of that name."""
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(folder))
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise DataError(f"{path}: no split {split!r}; it has {', '.join(dataset)}")
    return dataset[split]


def _not_read(path: str, folder: Path, split: str, reason: str) -> str:
    if not folder.exists():
        return f"{path}: no folder here (from {Path.cwd()}), and as a hub name: {reason}"
    if _is_saved(folder):
        return f"{path} ({split}): not a whole dataset of save_to_disk ({reason}); save it again"
    hint = "files of JSON lines or Parquet are type: jsonl or parquet"
    return f"{path} ({split}): datasets cannot read it ({reason}); {hint}"


def _is_saved(folder: Path) -> bool:
    """True for a folder that save_to_disk wrote."""
    return any((folder / marker).exists() for marker in ("state.json", "dataset_dict.json"))


@contextmanager
def _reading(message: Callable[[str], str]) -> Iterator[None]:
    """Turn every error of datasets and pyarrow into a DataError; failures of the machine pass as they are.

    Args:
        message: makes the text of the DataError from the reason in one line.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # they raise errors of a dozen kinds, those of their own libraries among them
        reason = error.__cause__ or error  # datasets wraps what it met in an error that says nothing of it
        if isinstance(reason, OSError) and reason.errno not in _OF_THE_FOLDER:
            raise reason from None
        text = (str(reason).strip().splitlines() or [""])[0]
        said = text if isinstance(reason, OSError | ValueError) else f"{type(reason).__name__}: {text}"
        raise DataError(message(said)) from error


def read_texts(pattern: str) -> Iterator[tuple[Place, str]]:
    """(where, text) of whole .txt files, plain or gzipped, and of the field `text` of JSONL records.

    Raises DataError, which names the file, for one that is not UTF-8, and as read_jsonl and texts_of do.
    """
    for path in find_files(pattern):
        if ".jsonl" in path.suffixes:
            yield from texts_of(read_jsonl(str(path)))
        else:
            try:
                yield (
                    Place(str(path), path.parent),
                    b"".join(read_lines(path)).decode("utf-8-sig").replace("\r\n", "\n"),
                )
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 ({error}); convert it") from None


def texts_of(records: Iterator[Record]) -> Iterator[tuple[Place, str]]:
    """(where, text) of records with a field `text`; a text in a field `source` says what they come from.

    Raises DataError for one without.
    """
    for where, record in records:
        if not isinstance(record.get("text"), str):
            raise DataError(f"{where}: expected a field `text`; found {', '.join(record) or 'no fields'}")
        if isinstance(record.get("source"), str):
            where.source = record["source"]
        yield where, record["text"]


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, gzipped or not. Raises DataError for a gzipped file that is damaged or cut off."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
