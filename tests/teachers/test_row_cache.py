"""A cache of rows: texts found by their digests, growth, what a kill and a rank leave alone, and damage that is named."""

import json
import os

import numpy as np
import pytest
import torch

from minillm import UserError
from minillm.models.batch import TokenSequence
from minillm.storage.manifest import sign
from minillm.teachers import row_cache
from minillm.teachers.row_cache import CACHE, INDEX, RowCache, digest_of, find_cache, shard_name
from minillm.teachers.row_shards import RowShards
from minillm.teachers.row_storage import RowStorage, StorageError

STORAGE = RowStorage("hidden", "int8", 6)
BY = {"teacher": {"path": "t"}, "storage": ["hidden", "int8"]}
ROOM = 10 * STORAGE.bytes_per_row  # a shard holds ten rows


def text(number: int) -> TokenSequence:
    return TokenSequence([number], list(range(number % 7 + 1)), key=number)


def rows_of(one: TokenSequence) -> dict[str, torch.Tensor]:
    torch.manual_seed(one.key)
    length = len(one.response)
    return {"hidden": torch.randint(-127, 128, (length, 6), dtype=torch.int8), "scale": torch.rand(length)}


def write(folder, texts, *, most=None, by=BY):
    """Write what is missing, at most so many shards, and publish where it is all there. Returns the folder or None."""
    shards = RowShards(folder / "rows", STORAGE, shard_bytes=ROOM)
    finished = shards.prepare(by)
    pieces = shards.pieces(texts, finished)
    missing = [piece for piece in pieces if not shards.is_written(piece)]
    for piece in missing[:most]:
        shards.write(piece, [rows_of(texts[place]) for place in piece.texts], StorageError({"rows": 1.0}))
    if most is not None and most < len(missing):
        return None
    numbers = shards.finish(finished, pieces)
    published = folder / f"published-{len(numbers)}-{len(texts)}"
    published.mkdir()
    shards.publish(numbers, published, {"texts": ["references"]})
    sign(published)
    return published


TEXTS = [text(number) for number in range(20)]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cache"), TEXTS)


def test_every_text_has_its_own_rows_in_any_order(published):
    cache = RowCache(published)
    assert len(cache) == 20 and cache.storage == STORAGE
    for one in reversed(TEXTS):
        place = cache.find(digest_of(one))
        found = cache.read(place)
        assert all(torch.equal(found[name], part) for name, part in rows_of(one).items())
    said = cache.described
    assert said["rows_total"] == sum(len(one.response) for one in TEXTS) and said["bytes_per_row"] == 10
    assert len(said["shards"]) > 5 and all(one["rows"] <= 10 for one in said["shards"].values())
    assert said["error"]["rows"] == len(said["shards"])


def test_a_text_is_known_by_all_that_it_says():
    one = TokenSequence([1, 2], [3, 4], 7, {"pixel_values": torch.tensor([[1.0, 2.0]])})
    others = [
        TokenSequence([1], [2, 3, 4]),
        TokenSequence([1, 2], [3, 5]),
        TokenSequence([1, 2], [3, 4]),
        TokenSequence([1, 2], [3, 4], 7, {"pixel_values": torch.tensor([[1.0, 3.0]])}),
        TokenSequence([1, 2], [3, 4], 7, {"other": torch.tensor([[1.0, 2.0]])}),
        TokenSequence([1, 2], [3, 4], 7, {"pixel_values": torch.tensor([[1.0], [2.0]])}),
    ]
    assert len({digest_of(one), *map(digest_of, others)}) == 7
    again = TokenSequence([1, 2], [3, 4], 9, {"pixel_values": torch.tensor([[1.0, 2.0]])})  # of another record
    assert digest_of(one) == digest_of(again)


def test_texts_whose_digests_begin_alike_are_told_apart(published, monkeypatch):
    cache = RowCache(published)
    digests = {number: digest_of(one) for number, one in enumerate(TEXTS)}
    monkeypatch.setattr(cache, "_leading", np.full(20, 5, np.uint64))
    for digest in digests.values():
        place = cache.find(np.uint64(5).tobytes() + digest[8:])
        assert place is not None and cache.find(np.uint64(5).tobytes() + bytes(8)) is None
    assert cache.find(bytes(16)) is None


def test_new_texts_are_added_and_the_shards_that_are_there_stay(tmp_path, published):
    first = write(tmp_path, TEXTS[:12])
    before = {path.name: path.read_bytes() for path in first.glob("rows-*")}
    grown = write(tmp_path, [*TEXTS[12:], *TEXTS])  # in another order, and some twice
    after = {path.name: path.read_bytes() for path in grown.glob("rows-*")}
    assert before.items() <= after.items() and len(after) > len(before)
    cache = RowCache(grown)
    assert len(cache) == 20
    assert all(torch.equal(cache.read(cache.find(digest_of(one)))["scale"], rows_of(one)["scale"]) for one in TEXTS)
    smaller = write(tmp_path, TEXTS[:3])  # less data takes nothing away
    assert len(RowCache(smaller)) == 20
    if os.stat(grown / shard_name(0)).st_nlink > 1:  # no copy where the disk has links
        assert (grown / shard_name(0)).samefile(tmp_path / "rows" / shard_name(0))


@pytest.mark.parametrize("written", [1, 4])
def test_an_interrupted_writing_goes_on_to_the_same_files(tmp_path, published, written):
    assert write(tmp_path, TEXTS, most=written) is None
    (tmp_path / "rows" / f".{shard_name(9)}.partial").write_text("what a kill left")
    resumed = write(tmp_path, TEXTS)
    for path in (*published.glob("*.safetensors"), published / CACHE):
        assert path.read_bytes() == (resumed / path.name).read_bytes(), path.name
    assert not list((tmp_path / "rows").glob(".*"))


def test_shards_of_data_that_has_changed_since_a_kill_are_written_anew(tmp_path):
    write(tmp_path, TEXTS, most=2)
    other = [TokenSequence([90], [1, 2, 3], key=90), *TEXTS[1:]]
    cache = RowCache(write(tmp_path, other))
    assert len(cache) == 20 and cache.find(digest_of(TEXTS[0])) is None
    assert torch.equal(cache.read(cache.find(digest_of(other[0])))["hidden"], rows_of(other[0])["hidden"])


def test_rows_of_another_teacher_are_not_added_to(tmp_path):
    write(tmp_path, TEXTS)
    with pytest.raises(UserError, match="holds rows that were written with another teacher; undo the change"):
        write(tmp_path, TEXTS, by={**BY, "teacher": {"path": "u"}})


def damaged(published, folder, name, change):
    folder.mkdir()
    for path in published.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    return folder


def test_an_altered_shard_is_named_when_it_is_read_and_can_be_written_anew(published, tmp_path):
    flip = lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]  # noqa: E731
    place = RowCache(published).find(digest_of(TEXTS[4]))
    name = shard_name(place.shard)
    cache = RowCache(damaged(published, tmp_path / "flipped", name, flip))
    broken = []
    for one in TEXTS:
        try:
            cache.read(cache.find(digest_of(one)))
        except UserError as error:
            broken.append(str(error))
    assert len(broken) == 1 and f"{name} was altered: rows " in broken[0] and "minillm cache` again" in broken[0]

    write(tmp_path, TEXTS)
    (tmp_path / "rows" / name).unlink()
    again = RowCache(write(tmp_path, [*TEXTS, TEXTS[0]]))
    assert len(again) == 20 and not (again.folder / name).exists()
    assert torch.equal(again.read(again.find(digest_of(TEXTS[4])))["hidden"], rows_of(TEXTS[4])["hidden"])


@pytest.mark.parametrize(
    "name, change, says",
    [
        (shard_name(1), lambda content: content[:-1], "rows-000001.safetensors has .* bytes instead of"),
        (INDEX, lambda content: content[:-1] + b"x", "index.safetensors was altered"),
        (CACHE, lambda content: content.replace(b"6", b"7", 1), "cache.json was altered"),
    ],
)
def test_other_damage_is_named_when_a_cache_is_opened(published, tmp_path, name, change, says):
    with pytest.raises(UserError, match=says):
        RowCache(damaged(published, tmp_path / "damaged", name, change))


def test_few_shards_are_open_at_a_time(published, monkeypatch):
    monkeypatch.setattr(row_cache, "OPEN_SHARDS", 2)
    cache = RowCache(published)
    for one in [*TEXTS, *TEXTS]:
        cache.read(cache.find(digest_of(one)))
        assert len(cache._shards) <= 2


def test_a_cache_is_found_in_its_folder_in_a_run_and_by_its_stage(published, tmp_path):
    run = tmp_path / "run"
    (run / "stages").mkdir(parents=True)
    (run / "stages" / "main").symlink_to(published)
    assert find_cache(str(published), tmp_path) == published
    assert find_cache(str(run), tmp_path) == find_cache("stage:main", run) == run / "stages" / "main"
    with pytest.raises(UserError, match="stage:other: .* holds no cache; the stage has not finished"):
        find_cache("stage:other", run)
    with pytest.raises(UserError, match="is no cache: expected a folder with a cache.json"):
        find_cache(str(tmp_path), run)
    version = tmp_path / "later"
    version.mkdir()
    for path in published.iterdir():
        (version / path.name).write_bytes(path.read_bytes())
    (version / CACHE).write_text(json.dumps({"format": 1}))
    sign(version)
    with pytest.raises(UserError, match="written by another version .format 1."):
        RowCache(version)
