"""Questions about Python's library: the same on every call, and no answer of the test split in training."""

import subprocess
import sys

from minillm.data.pydoc import documented_names, first_paragraph, pydoc_documents, pydoc_records

DIGEST = "import hashlib; from minillm.data.pydoc import documented_names as d; print(hashlib.md5(repr(d()).encode()).hexdigest())"


def test_the_splits_are_disjoint_and_whole():
    train, test = list(pydoc_records("train")), list(pydoc_records("test"))
    names = [{where for where, _ in split} for split in (train, test)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == len(documented_names()) == len(train) + len(test)
    answers = [{record["output"] for _, record in split} for split in (train, test)]
    assert not answers[0] & answers[1], "a docstring that two names share would leak"
    assert 0.05 < len(test) / (len(train) + len(test)) < 0.2
    assert len(train) > 1000


def test_another_process_finds_the_same():
    """Sets of strings are ordered anew in every process."""
    runs = {
        subprocess.run(
            [sys.executable, "-c", DIGEST], env={"PYTHONHASHSEED": seed, "PATH": ""}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


def test_documents_leave_the_test_split_out():
    documents = list(pydoc_documents())
    test = {record["output"] for _, record in pydoc_records("test")}
    assert len(documents) == len(list(pydoc_records("train")))
    assert not any(document.split("\n", 1)[1] in test for document in documents)


def test_the_first_paragraph_without_a_signature():
    def documented():
        """documented(x) -> y

        Count the things there are and
        say how many they were.

        More of it.
        """

    class Bare:
        pass

    assert first_paragraph(documented) == "Count the things there are and say how many they were."
    assert first_paragraph(Bare) == "", "object's own documentation is not the class's"


def test_builtins_are_there():
    names = dict(documented_names())
    assert "sorted" in names and any(name.startswith("json.") for name in names)
