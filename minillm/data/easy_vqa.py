"""Questions about coloured shapes: the data of the package easy-vqa, which a tiny model of images and text learns from nothing.

4,000 pictures of 64 x 64 pixels to train on and 1,000 to be tested by, each with one shape, and about ten questions to each
with one word for an answer: yes or no, a colour, or a shape. The package is not imported.
"""

import hashlib
import importlib.util
import json
from collections.abc import Collection, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from minillm.data.sources import DataError, Place, Record

ANSWERS = {
    "yes_no": ("yes", "no"),
    "color": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
    "shape": ("circle", "rectangle", "triangle"),
}
KINDS = {word: kind for kind, words in ANSWERS.items() for word in words}


class _Asked(NamedTuple):
    digest: bytes  # of question and picture
    question: str
    answer: str
    picture: int


def easy_vqa_records(
    split: str, answers: Collection[str] = tuple(ANSWERS), *, balanced: bool = False
) -> Iterator[Record]:
    """Records with question, answer, image, and for pairs chosen (the answer) and rejected, another of its kind.

    Their order is a fixed one at random, so that the first of them are of many pictures.

    Args:
        split: train or test, whose pictures are others.
        answers: the kinds of answers that are wanted, names of ANSWERS.
        balanced: take questions of these kinds in turn, as many of each as there are of the rarest one.

    Raises DataError where the package is not there, or not whole.
    """
    folder = _folder() / split
    wanted = [one for one in _questions(folder) if KINDS[one.answer] in answers]
    if balanced:
        by_kind = [[one for one in wanted if KINDS[one.answer] == kind] for kind in ANSWERS if kind in answers]
        wanted = list(chain.from_iterable(zip(*by_kind, strict=False)))  # as many as there are of the rarest kind
    for one in wanted:
        others = [word for word in ANSWERS[KINDS[one.answer]] if word != one.answer]
        record = {
            "question": one.question,
            "answer": one.answer,
            "image": f"images/{one.picture}.png",
            "chosen": one.answer,
            "rejected": others[one.digest[0] % len(others)],
        }
        yield Place(f"easy-vqa ({split}), picture {one.picture}: {one.question}", folder, "easy-vqa"), record


@cache
def _questions(folder: Path) -> tuple[_Asked, ...]:
    try:
        asked = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: not the data of easy-vqa ({error}); install the package again") from None
    unknown = next((answer for _, answer, _ in asked if answer not in KINDS), None)
    if unknown is not None:
        raise DataError(f"{folder}: {unknown!r} is no answer of easy-vqa 1.0; install that version")
    digests = (hashlib.sha256(f"{picture} {question}".encode()).digest() for question, _, picture in asked)
    return tuple(sorted(_Asked(digest, *one) for digest, one in zip(digests, asked, strict=True)))


def _folder() -> Path:
    found = importlib.util.find_spec("easy_vqa")
    if found is None or not found.submodule_search_locations:
        raise DataError("type easy_vqa needs easy-vqa, which is not installed: pip install easy-vqa==1.0")
    return Path(found.submodule_search_locations[0]) / "data"
