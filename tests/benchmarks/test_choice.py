"""The corpus of three kinds, and the table of what stages of miniplm have kept of it."""

import json

import pytest

from minillm import UserError
from minillm.benchmarks.choice import HALVES, REPEATS, main, write_corpus
from minillm.data.selection import SELECTION


def read(folder, kind):
    files = [folder / half / f"{kind}.jsonl" for half in HALVES]
    return [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in files]


def test_half_of_the_corpus_is_clean_and_a_quarter_each_is_shuffled_and_repeated(tmp_path):
    stories = [" ".join(f"word{one}-{place}" for place in range(30)) for one in range(3 * REPEATS + 1)]
    write_corpus(stories, tmp_path / "one", seed=3)
    write_corpus(stories, tmp_path / "again", seed=3)
    found = {kind: read(tmp_path / "one", kind) for kind in ("clean", "shuffled", "repeated")}
    assert all(found[kind] == read(tmp_path / "again", kind) for kind in found)
    assert sum(len(half[0]) for half in found.values()) == 4 * REPEATS / 2  # a half of all
    clean, shuffled, repeated = (sorted(a + b) for a, b in found.values())
    assert len(clean) == len(set(clean)) == 2 * REPEATS and len(shuffled) == len(repeated) == REPEATS
    assert set(clean) < set(stories) and not set(shuffled) & set(stories)
    words = {" ".join(sorted(one.split())) for one in shuffled}
    assert words <= {" ".join(sorted(one.split())) for one in set(stories) - set(clean)} and len(words) == REPEATS
    assert set(repeated) == set(stories) - set(clean) - {
        one for one in stories if " ".join(sorted(one.split())) in words
    }
    with pytest.raises(UserError, match="3 texts are too few"):
        write_corpus(stories[:3], tmp_path / "few", seed=3)


def test_the_table_has_the_part_of_each_kind_that_was_kept(tmp_path, capsys):
    folder = tmp_path / "seed-1" / "choose" / "stages" / "choose"
    folder.mkdir(parents=True)
    counts = {"half-a/clean": (10, 9), "half-b/clean": (10, 10), "half-a/shuffled": (8, 1), "half-b/repeated": (12, 0)}
    sources = [
        {"source": f"somewhere/{name}.jsonl", "documents": documents, "kept": kept}
        for name, (documents, kept) in counts.items()
    ]
    (folder / SELECTION).write_text(json.dumps({"sources": sources}))
    assert main([str(tmp_path), "--output", str(tmp_path / "kept.md")]) == 0
    page = (tmp_path / "kept.md").read_text()
    assert page in capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in page.splitlines()[2:]]
    assert rows == [
        ["clean", "20", "95.0", "50.0"], ["shuffled", "8", "12.5", "50.0"], ["repeated", "12", "0.0", "50.0"]
    ]  # fmt: skip
    with pytest.raises(UserError, match="no stage of miniplm has ended there"):
        main([str(tmp_path / "seed-1" / "choose" / "stages" / "nothing")])
