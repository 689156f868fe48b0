"""Records from every kind of file, and errors that say where."""

import errno
import gzip
from pathlib import Path

import datasets
import pytest
from datasets import Dataset, DatasetDict

from minillm.data.sources import DataError, find_files, read_hf, read_jsonl, read_parquet, read_texts

RECORDS = [{"text": "one"}, {"text": "zwölf\u2028 𝔘"}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")  # the variable was read at import


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_jsonl(jsonl, name):
    path = jsonl(RECORDS[0], "", RECORDS[1], name=name)
    assert list(read_jsonl(path)) == [(f"{path}:1", RECORDS[0]), (f"{path}:3", RECORDS[1])]


def test_jsonl_of_other_systems(tmp_path):
    """A byte-order mark, CRLF, and a line separator inside a text."""
    path = tmp_path / "data.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n{"text": "c"}'.encode())
    assert [record["text"] for _, record in read_jsonl(str(path))] == ["a\u2028b", "c"]


@pytest.mark.parametrize("line, message", [('{"text": ', "not JSON"), ("[1]", "expected a JSON object, found list")])
def test_a_wrong_line_is_named(jsonl, line, message):
    path = jsonl(RECORDS[0], line)
    with pytest.raises(DataError, match=f"{path}:2: {message}"):
        list(read_jsonl(path))


def test_a_line_of_another_encoding_is_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(DataError, match=f"{path}:2: not JSON in UTF-8"):
        list(read_jsonl(str(path)))
    path = tmp_path / "book.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=f"{path}: not UTF-8"):
        list(read_texts(str(path)))


def test_a_file_of_another_kind_is_named(jsonl):
    path = jsonl(RECORDS[0], name="data.parquet")
    with pytest.raises(DataError, match=f"{path}: not a whole Parquet file"):
        list(read_parquet(path))


def _with_zeros(data: bytes, start: int, length: int) -> bytes:
    return data[:start] + bytes(length) + data[start + length :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],  # without its footer
        lambda data: b"",
        lambda data: b"PAR1" + bytes(20) + b"PAR1",  # a footer that is none
        lambda data: _with_zeros(data, 4, 40),  # the header of the first page
        lambda data: _with_zeros(data, 100, 200),  # a page, which is only seen when its rows are read
        lambda data: data[:200] + data[300:],  # a hole
    ],
    ids=["cut off", "empty", "footer", "header", "page", "hole"],
)
def test_a_damaged_parquet_file_is_named(tmp_path, damage):
    path = tmp_path / "data.parquet"
    Dataset.from_list([{"text": f"record {number} of many"} for number in range(500)]).to_parquet(path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"^{path}: not a whole Parquet file \\(.+\\)$"):
        list(read_parquet(str(path)))


def test_a_full_disk_is_no_fault_of_the_file(tmp_path, monkeypatch):
    """datasets keeps what it reads in a cache of its own."""
    path = tmp_path / "data.parquet"
    Dataset.from_list(RECORDS).to_parquet(path)

    def full(*arguments, **options):
        raise datasets.exceptions.DatasetGenerationError("An error occurred") from OSError(
            errno.ENOSPC, "No space left"
        )

    monkeypatch.setattr(Dataset, "from_parquet", full)
    with pytest.raises(OSError, match="No space left"):
        list(read_parquet(str(path)))


def test_lines_nested_without_end_are_named(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}\n{"text": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(DataError, match=f"{path}:2: lists or objects nested too deeply"):
        list(read_jsonl(str(path)))


def test_a_cut_off_gzip_file_is_named(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 100)[:-9])
    with pytest.raises(DataError, match=f"{path}: not a whole gzip file"):
        list(read_jsonl(str(path)))
    path.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(DataError, match=f"{path}: not a whole gzip file"):
        list(read_jsonl(str(path)))


def test_globs_are_sorted_and_names_taken_literally(jsonl, tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "odd[1].jsonl"):
        jsonl({"text": name}, name=name)
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert [record["text"] for _, record in read_jsonl("$PLACE/?.jsonl")] == ["a.jsonl", "b.jsonl"]
    assert [record["text"] for _, record in read_jsonl(str(tmp_path / "odd[1].jsonl"))] == ["odd[1].jsonl"]
    with pytest.raises(DataError, match="no such file"):
        find_files(str(tmp_path / "*.nothing"))


def test_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    Dataset.from_list(RECORDS).to_parquet(path)
    assert list(read_parquet(str(path))) == [(f"{path}, row {row}", record) for row, record in enumerate(RECORDS)]


def test_saved_datasets(tmp_path):
    dataset = Dataset.from_list(RECORDS)
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict(train=dataset.select([0]), test=dataset.select([1])).save_to_disk(tmp_path / "two")
    assert [record for _, record in read_hf(str(tmp_path / "one"), None, "train")] == RECORDS
    assert [record for _, record in read_hf(str(tmp_path / "two"), None, "test")] == RECORDS[1:]
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        list(read_hf(str(tmp_path / "two"), None, "dev"))


@pytest.mark.parametrize("damage", ["cut", "zeros", "state", "gone"])
def test_a_damaged_saved_dataset_is_named(tmp_path, damage):
    Dataset.from_list([{"text": "a" * 100}] * 100).save_to_disk(tmp_path / "set")
    (file,) = (tmp_path / "set").glob("*.arrow")
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "state":
        (tmp_path / "set" / "state.json").write_text("{")
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else bytes(len(data)))
    with pytest.raises(DataError, match=r"set \(train\): not a whole dataset of save_to_disk \(.+\); save it again"):
        list(read_hf(str(tmp_path / "set"), None, "train"))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_that_the_hub_does_not_have_or_cannot_give(monkeypatch, streaming):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^no-such/set: no folder here \(from .*\), and as a hub name: "):
        list(read_hf("no-such/set", None, "train", streaming=streaming))


def test_a_stream_that_breaks_off_is_named(monkeypatch):
    def broken(*arguments, **options):
        def rows():
            yield {"text": "one"}
            raise RuntimeError("connection reset")

        return datasets.IterableDataset.from_generator(rows)

    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(DataError, match="no-such/set: .* RuntimeError: connection reset"):
        list(read_hf("no-such/set", None, "train", streaming=True))


def test_a_folder_of_plain_files_is_a_dataset_too(jsonl, tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", str(tmp_path))
    (tmp_path / "set").mkdir()
    Path(jsonl({"text": "a"})).rename(tmp_path / "set" / "train.jsonl")
    assert [record for _, record in read_hf("$PLACE/set", None, "train")] == [{"text": "a"}]
    with pytest.raises(DataError, match=r"\$PLACE/set \(dev\): .*split"):
        list(read_hf("$PLACE/set", None, "dev"))
    with pytest.raises(DataError, match=r"\$PLACE/set \(train\): .*other"):
        list(read_hf("$PLACE/set", "other", "train"))


def test_a_dataset_that_the_hub_does_not_have_is_named(monkeypatch):
    def unreachable(*arguments, **options):  # as datasets says it where there is no network
        raise ConnectionError("Couldn't reach 'no-such/set' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        DataError, match="no-such/set: no folder here .*, and as a hub name: Couldn't reach '.*IsEnabled.$"
    ):
        next(read_hf("no-such/set", None, "train"))


def test_a_full_disk_is_no_missing_dataset(monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("datasets.load_dataset", full)
    with pytest.raises(OSError, match="No space left"):
        next(read_hf("some/set", None, "train"))


def test_texts(jsonl, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"first\r\n\r\nline")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("second")
    assert [text for _, text in read_texts(str(tmp_path / "*.txt*"))] == ["first\n\nline", "second"]
    path = jsonl(*RECORDS, name="data.jsonl.gz")
    assert [text for _, text in read_texts(path)] == [record["text"] for record in RECORDS]
    path = jsonl({"text": "a"}, {"body": "b"})
    with pytest.raises(DataError, match=f"{path}:2: expected a field `text`; found body"):
        list(read_texts(path))
