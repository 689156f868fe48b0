"""Records from files, with the place each came from, for errors that name it."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm import UserError
from minillm.config.paths import expand, matching_files

Record = tuple["Place", dict[str, Any]]  # (where it stands, what it says)


class Place(str):
    """Where a record stands, for errors; `folder` is what relative paths in it count from."""

    folder: Path

    def __new__(cls, text: str, folder: Path = Path(".")):
        place = super().__new__(cls, text)
        place.folder = folder
        return place


class DataError(UserError):
    """A record or file that cannot be used; the message names it."""


def find_files(pattern: str) -> list[Path]:
    """The files a path or glob names, sorted. Raises DataError where there is none."""
    files = matching_files(expand(pattern))
    if not files:
        raise DataError(f"{pattern}: no such file")
    return files


def read_jsonl(pattern: str) -> Iterator[Record]:
    """JSON objects, a line each, plain or gzipped; blank lines are passed over."""
    for path in find_files(pattern):
        for number, line in enumerate(read_lines(path), 1):
            if not line.strip():
                continue
            where = Place(f"{path}:{number}", path.parent)
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # JSON's and UTF-8's
                raise DataError(f"{where}: not JSON in UTF-8 ({error}); expected one object a line") from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}")
            yield where, record


def read_parquet(pattern: str) -> Iterator[Record]:
    """Rows of Parquet files."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError
    from pyarrow import ArrowException

    for path in find_files(pattern):
        try:
            dataset = Dataset.from_parquet(str(path))
        except (ArrowException, DatasetGenerationError) as error:
            raise DataError(f"{path}: not a Parquet file ({_first_line(error)})") from None
        for number, record in enumerate(_undecoded(dataset)):
            yield Place(f"{path}, row {number}", path.parent), record


def read_hf(path: str, name: str | None, split: str, *, streaming: bool = False) -> Iterator[Record]:
    """Rows of a dataset folder written by save_to_disk, or of a hub dataset; `streaming` fetches what is read alone."""
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    folder = Path(os.path.expandvars(path)).expanduser()
    if folder.is_dir() and any((folder / marker).exists() for marker in ("state.json", "dataset_dict.json")):
        dataset = load_from_disk(str(folder))
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise DataError(f"{path}: no split {split!r}; it has {', '.join(dataset)}")
            dataset = dataset[split]
    else:
        try:
            place = str(folder) if folder.exists() else path
            dataset = load_dataset(place, name, split=split, streaming=streaming)
        except ValueError as error:  # a split or a configuration that it has not
            raise DataError(f"{path} ({split}): {_first_line(error)}") from None
        except OSError as error:  # no such dataset, or no way to the hub
            if folder.exists() or error.errno is not None:
                raise
            raise DataError(
                f"{path}: no folder here (from {Path.cwd()}), and as a hub name: {_first_line(error)}"
            ) from None
        except DatasetGenerationError as error:
            reason = _first_line(error.__cause__ or error)
            raise DataError(
                f"{path}: datasets cannot read it ({reason}); files of JSON lines or Parquet are type: jsonl or parquet"
            ) from None
    for number, record in enumerate(_undecoded(dataset)):
        yield Place(f"{path} ({split}), row {number}", folder), record


def _undecoded(dataset):
    """The dataset with its pictures as they are stored, so that a broken one is found with the record that shows it."""
    from datasets import Image, List

    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, Image):
            dataset = dataset.cast_column(name, Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), Image):
            dataset = dataset.cast_column(name, List(Image(decode=False)))
    return dataset


def read_texts(pattern: str) -> Iterator[tuple[str, str]]:
    """(where, text): whole .txt files, plain or gzipped, or the field `text` of JSONL records."""
    for path in find_files(pattern):
        if ".jsonl" in path.suffixes:
            yield from texts_of(read_jsonl(str(path)))
        else:
            try:
                yield str(path), b"".join(read_lines(path)).decode("utf-8-sig").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 ({error}); convert it") from None


def texts_of(records: Iterator[Record]) -> Iterator[tuple[str, str]]:
    """(where, text) of records with a field `text`. Raises DataError for one without."""
    for where, record in records:
        if not isinstance(record.get("text"), str):
            raise DataError(f"{where}: expected a field `text`; found {', '.join(record) or 'no fields'}")
        yield where, record["text"]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, gzipped or not. Raises DataError for a gzipped file that is damaged or cut off."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        try:
            yield from file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
