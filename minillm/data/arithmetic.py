"""Sums of several steps with worked solutions, made on the spot: a task that a small model can learn from nothing."""

import hashlib
import random
from collections.abc import Iterator

from minillm.data.sources import Place, Record


def arithmetic_records(steps: int, largest: int, split: str) -> Iterator[Record]:
    """Records with question, rationale, label and answer, without end; the same ones on every machine.

    Args:
        steps: additions and subtractions in a question; no result on the way is negative.
        largest: the largest number in a question.
        split: test is a tenth of all questions, chosen by hash; train is the rest.
    """
    generator, number = random.Random(f"{steps} {largest} {split}"), 0
    while True:
        record = _record(generator, steps, largest)
        digest = hashlib.sha256(record["question"].encode()).digest()
        if (digest[0] % 10 == 0) == (split == "test"):
            number += 1
            yield Place(f"arithmetic ({split}), record {number}"), record


def _record(generator: random.Random, steps: int, largest: int) -> dict[str, str]:
    value = generator.randint(0, largest)
    question, lines = str(value), []
    for _ in range(steps):
        number = generator.randint(0, largest)
        sign = generator.choice("+-") if number <= value else "+"
        result = value + number if sign == "+" else value - number
        question += f" {sign} {number}"
        lines.append(f"{value} {sign} {number} = {result}")
        value = result
    rationale = "\n".join(lines)
    return {"question": question, "rationale": rationale, "label": str(value), "answer": f"{rationale}\n#### {value}"}
