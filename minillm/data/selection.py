"""The documents with the highest scores of a corpus, and what is to be told of those that were kept and dropped."""

import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from minillm import UserError
from minillm.data.documents import Documents
from minillm.data.score_shards import Scores

SELECTION = "selection.json"  # of a folder that a stage left: what minillm.reporting shows
BINS, TAIL = 50, 0.005  # of a histogram; the part of all documents beyond its first and its last bin, at most
SHOWN, SHOWN_CHARACTERS = 4, 600  # samples of either kind, and of each text
MOST_SOURCES = 1000  # that are counted one by one
OTHER_SOURCES = "(others)"


def kept_count(ratio: float, documents: int) -> int:
    """floor(ratio * documents) for the decimal that `ratio` is written as: 29 for 0.29 of 100, where floats give 28."""
    return Fraction(repr(ratio)) * documents // 1


def choose(scores: Scores, ratio: float) -> np.ndarray:  # (n,) bool
    """The documents to keep: of those with a prediction the `ratio` with the highest log-ratio; of equals the earlier ones.

    Raises UserError where that is none, or where a score is not finite.
    """
    scored = scores.tokens > 0
    value = np.where(scored, scores.log_ratio, -np.inf)
    wrong = np.flatnonzero(~np.isfinite(value) & scored)
    if len(wrong):
        raise UserError(
            f"data.corpus: {len(wrong):,} documents have a score that is not finite, the first is number {wrong[0] + 1:,}; "
            "look for a model with broken weights, or one that overflows in its dtype (teacher.dtype: float32)"
        )
    count = kept_count(ratio, int(scored.sum()))
    if not count:
        raise UserError(
            f"method.ratio: {ratio:g} of {int(scored.sum()):,} documents is none; raise it, or give more documents"
        )
    kept = np.zeros(len(value), bool)
    kept[np.argsort(-value, kind="stable")[:count]] = True
    return kept


def write_selection(documents: Documents, scores: Scores, kept: np.ndarray, folder: Path, *, ratio: float) -> None:
    """Write the kept documents with their whole text, in order, to kept.jsonl, and selection.json on all of them.

    A line has the fields text, source, document (counted from 1) and score.
    """
    value = scores.log_ratio
    samples = {number: None for numbers in _samples(scores, kept).values() for number in numbers}
    sources: dict[str, np.ndarray] = {}
    number = 0
    with (folder / "kept.jsonl").open("w", encoding="utf-8") as file:
        for _, texts in documents.read_pieces(lambda index: True):
            for place, text in texts:
                name = place.source
                if name not in sources and len(sources) >= MOST_SOURCES:
                    name = OTHER_SOURCES
                counts = sources.setdefault(name, np.zeros(4, np.int64))
                counts += np.array([1, scores.tokens[number]] * 2) * [1, 1, kept[number], kept[number]]
                if number in samples:
                    samples[number] = text[:SHOWN_CHARACTERS]
                if kept[number]:
                    line = {
                        "text": text,
                        "source": place.source,
                        "document": number + 1,
                        "score": round(value[number], 6),
                    }
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                number += 1
    content = {
        "ratio": ratio,
        "documents": len(documents),
        "without_prediction": int((scores.tokens == 0).sum()),
        "lowest_kept": float(value[kept].min()),
        "groups": dict(_groups(scores, kept)),
        "histograms": {"score": _histogram(value, scores, kept), "tokens": _histogram(scores.tokens, scores, kept)},
        "sources": [
            {"source": name, "documents": int(all_), "tokens": int(tokens), "kept": int(part), "kept_tokens": int(kept_tokens)}
            for name, (all_, tokens, part, kept_tokens) in sources.items()
        ],
        "samples": {
            group: [
                {"document": one + 1, "score": float(value[one]), "tokens": int(scores.tokens[one]), "text": samples[one]}
                for one in numbers
            ]
            for group, numbers in _samples(scores, kept).items()
        },
    }  # fmt: skip
    (folder / SELECTION).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def _masks(scores: Scores, kept: np.ndarray) -> dict[str, np.ndarray]:
    return {"kept": kept, "dropped": ~kept & (scores.tokens > 0)}


def _groups(scores: Scores, kept: np.ndarray) -> Iterator[tuple[str, dict[str, float]]]:
    repeated = scores.first_place != np.arange(len(kept))
    for name, mask in _masks(scores, kept).items():
        there = mask.any()
        tokens = scores.tokens[mask]
        yield (
            name,
            {
                "documents": int(mask.sum()),
                "repeats": int(repeated[mask].sum()),
                "tokens": int(tokens.sum()),
                "median_tokens": float(np.median(tokens)) if there else 0.0,
                "score": float(scores.log_ratio[mask].mean()) if there else 0.0,
                "teacher_nll": float(scores.teacher_nll[mask].mean()) if there else 0.0,
                "reference_nll": float(scores.reference_nll[mask].mean()) if there else 0.0,
            },
        )


def _samples(scores: Scores, kept: np.ndarray) -> dict[str, list[int]]:
    """Of either kind some document numbers evenly spaced by score, from the highest to the lowest."""
    chosen = {}
    for name, mask in _masks(scores, kept).items():
        numbers = np.flatnonzero(mask)
        order = numbers[np.argsort(-scores.log_ratio[numbers], kind="stable")]
        places = np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int)
        chosen[name] = [int(one) for one in order[places]]
    return chosen


def _histogram(values: np.ndarray, scores: Scores, kept: np.ndarray) -> dict[str, list]:
    """Edges of bins, and the documents of either kind in each; the outermost ones have all beyond them."""
    low, high = np.quantile(values[scores.tokens > 0], [TAIL, 1 - TAIL])
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    inside = np.clip(values, edges[0], edges[-1])
    counts = {name: np.histogram(inside[mask], edges)[0].tolist() for name, mask in _masks(scores, kept).items()}
    return {"edges": edges.tolist(), **counts}
