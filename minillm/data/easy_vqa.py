"""Questions about coloured shapes: the data of the package easy-vqa, which a tiny model of images and text learns from nothing.

4,000 pictures of 64 x 64 pixels to train on and 1,000 to be tested by, each with one shape, and about ten questions to each
with one word for an answer: yes or no, a colour, or a shape. The package is not imported.
"""

import hashlib
import importlib.util
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from minillm.data.sources import DataError, Place, Record

ANSWERS = {
    "yes_no": ("yes", "no"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
    "shape": ("circle", "rectangle", "triangle"),
}


def easy_vqa_records(split: str, answers: Collection[str] = tuple(ANSWERS)) -> Iterator[Record]:
    """Records with question, answer, image, and for pairs chosen (the answer) and rejected, another of its kind.

    Their order is a fixed one at random, so that the first of them are of many pictures.

    Args:
        split: train or test, whose pictures are others.
        answers: the kinds of answers that are wanted, names of ANSWERS.

    Raises DataError where the package is not there, or not whole.
    """
    folder = _folder() / split
    try:
        asked = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not the data of easy-vqa ({error}); install the package again") from None
    for digest, question, answer, image in sorted((_digest(*one), *one) for one in asked):
        kind = next((name for name, words in ANSWERS.items() if answer in words), None)
        if kind is None:
            raise DataError(f"{folder}: {answer!r} is no answer of easy-vqa 1.0; install that version")
        if kind not in answers:
            continue
        others = [word for word in ANSWERS[kind] if word != answer]
        record = {
            "question": question,
            "answer": answer,
            "image": f"images/{image}.png",
            "chosen": answer,
            "rejected": others[digest[0] % len(others)],
        }
        yield Place(f"easy-vqa ({split}), picture {image}: {question}", folder, "easy-vqa"), record


def _digest(question: str, answer: str, image: int) -> bytes:
    return hashlib.sha256(f"{image} {question}".encode()).digest()


def _folder() -> Path:
    found = importlib.util.find_spec("easy_vqa")
    if found is None or not found.submodule_search_locations:
        raise DataError("type easy_vqa needs easy-vqa, which is not installed: pip install easy-vqa==1.0")
    return Path(found.submodule_search_locations[0]) / "data"
