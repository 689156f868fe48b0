"""From the ids of one tokenizer to those of another: PM-MinED (Cross-model Control, arXiv 2410.17599, section 3.3).

Every token t goes to the token of the same spelling. Where there is none, the candidates are the tokens that t begins with
and those that begin with t, and the nearest by edit distance is taken, of several the lowest id; since one of both is a
prefix of the other, their distance is the difference of their lengths. A bare space is a candidate for spaces alone.
Prefixes are looked up in a table of all of them (a trie, laid flat), so that 150,000 ids take seconds.

Special tokens go to those of the same role (EOS, end of turn, BOS, UNK, PAD) or name, and bytes to their byte. The released
code takes every token that is written <...> to the same id instead, which is nonsense between vocabularies that have
other tokens there; `special="by_id"` does so.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from minillm.models.spelling import ROLES, Spelling

VERSION = 1  # of the rule: maps that were kept under another one are made again
FOLDER = "vocabulary_maps"
Kind = Literal["unmapped", "exact", "shorter", "longer", "special"]
KINDS: tuple[Kind, ...] = ("unmapped", "exact", "shorter", "longer", "special")
MEANING: dict[Kind, str] = {
    "exact": "the same text",
    "shorter": "the longest token that it begins with",
    "longer": "the shortest token that begins with it",
    "special": "the same role or name",
    "unmapped": "none: left as it is",
}


@dataclass(frozen=True)
class VocabularyMap:
    """An id of the target for every id of the source."""

    ids: Tensor  # (V,) int64, -1 where there is none
    kinds: Tensor  # (V,) int64, places in KINDS

    def counts(self) -> dict[Kind, int]:
        """The number of ids of each kind."""
        found = torch.bincount(self.kinds, minlength=len(KINDS)).tolist()
        return dict(zip(KINDS, found, strict=True))

    def rows(self) -> list[tuple[str, str, str]]:
        """(kind, ids with their percentage, meaning) of every kind."""
        counts = self.counts()
        total = max(len(self.ids), 1)
        return [(kind, f"{counts[kind]:,} ({counts[kind] / total:.1%})", MEANING[kind]) for kind in MEANING]


def vocabulary_map(
    source: Spelling,
    target: Spelling,
    *,
    special: Literal["by_role", "by_id"] = "by_role",
    nearest: bool = True,
) -> VocabularyMap:
    """See the module. An id that the source does not name is unmapped; without `nearest`, one of whose text there is none."""
    by_id = special == "by_id"
    wanted = {index: text for index, text in source.texts.items()}
    offered = [(index, text) for index, text in target.texts.items() if by_id or index not in target.bytes]
    if by_id:
        wanted |= source.specials
        offered += target.specials.items()
    offered.sort()
    exact: dict[str, int] = {}
    for index, text in offered:
        exact.setdefault(text, index)
    of_bytes = {target.texts[index]: index for index in sorted(target.bytes, reverse=True)}
    longer = _shortest_continuations(offered, set(wanted.values())) if nearest else {}
    size = max(source.names, default=-1) + 1
    ids, kinds = torch.full((size,), -1), torch.zeros(size, dtype=torch.int64)
    found: dict[int, tuple[int, Kind]] = {}
    for index, text in wanted.items():
        if by_id and _is_bracketed(source.names[index]) and index in target.names:
            same = source.names[index] == target.names[index]
            found[index] = index, "exact" if same else "special"
        elif not by_id and index in source.bytes and text in of_bytes:
            found[index] = of_bytes[text], "exact"
        elif text in exact or text in of_bytes:
            found[index] = exact.get(text, of_bytes.get(text)), "exact"
        elif text and nearest:
            near = _nearest(text, exact, longer)
            if near is not None:
                found[index] = near
    if not by_id:
        found |= {index: (other, "special") for index, other in _specials(source, target).items()}
    for index, (other, kind) in found.items():
        ids[index], kinds[index] = other, KINDS.index(kind)
    return VocabularyMap(ids, kinds)


def kept_map(source: Spelling, target: Spelling, beside: Path | None) -> VocabularyMap:
    """The map of two vocabularies, kept in a folder of the model `beside` which it is used; None keeps it nowhere.

    A folder that cannot be written to keeps none, and a damaged file is made again.
    """
    if beside is None or not beside.is_dir():
        return vocabulary_map(source, target)
    path = beside / FOLDER / f"{_fingerprint(source, target)}.safetensors"
    try:
        kept = load_file(path)
        return VocabularyMap(kept["ids"], kept["kinds"])
    except (OSError, SafetensorError, KeyError):
        pass
    made = vocabulary_map(source, target)
    try:
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"ids": made.ids, "kinds": made.kinds}, partial)
        partial.replace(path)
    except OSError:
        pass
    return made


def _shortest_continuations(offered: list[tuple[int, str]], wanted: set[str]) -> dict[str, tuple[int, int]]:
    """For each wanted text the (length, id) of the shortest other that begins with it, of several the lowest id."""
    table: dict[str, tuple[int, int]] = {}
    for length, index, text in sorted((len(text), index, text) for index, text in offered):
        for end in range(1, length):
            prefix = text[:end]
            if prefix in wanted:
                table.setdefault(prefix, (length, index))
    return table


def _nearest(text: str, exact: Mapping[str, int], longer: Mapping[str, tuple[int, int]]) -> tuple[int, Kind] | None:
    candidates: list[tuple[int, int, Kind]] = []
    spaces = not text.strip(" ")
    for end in range(len(text) - 1, 0, -1):
        other = exact.get(text[:end])
        if other is not None and (spaces or text[:end] != " "):
            candidates.append((len(text) - end, other, "shorter"))
            break
    if text in longer:
        length, other = longer[text]
        candidates.append((length - len(text), other, "longer"))
    if not candidates:
        return None
    _, other, kind = min(candidates)
    return other, kind


def _specials(source: Spelling, target: Spelling) -> dict[int, int]:
    """Special tokens by their role, and by their name where they have none that the target has too."""
    named = {name: index for index, name in sorted(target.specials.items(), reverse=True)}
    found = {index: named[name] for index, name in source.specials.items() if name in named}
    theirs = dict(target.roles)
    theirs.setdefault("turn", theirs.get("eos", -1))
    for role in reversed(ROLES):  # of several roles the first counts
        if role in source.roles and theirs.get(role, -1) >= 0:
            found[source.roles[role]] = theirs[role]
    return found


def _is_bracketed(name: str) -> bool:
    return len(name) > 2 and name.startswith("<") and name.endswith(">")


def _fingerprint(source: Spelling, target: Spelling) -> str:
    digest = hashlib.sha256(f"{VERSION}".encode())
    for one in (source, target):
        parts = [sorted(one.names.items()), sorted(one.specials.items()), sorted(one.bytes), sorted(one.roles.items())]
        digest.update(json.dumps(parts).encode())
    return digest.hexdigest()[:24]
